"""The parallel passes of curation, in their order: list, verify, write. Called by stage.py on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
import torch

from sailvl_trainer.contract import HELD_OUT_DIR, SHARDS_DIR, CurateConfig
from sailvl_trainer.curate.artifacts import Parts, PlannedShard, read_items, to_items, write_items, write_rows
from sailvl_trainer.curate.ingest import list_items
from sailvl_trainer.curate.items import Container, Item, read_item
from sailvl_trainer.curate.verify import Verified, verify
from sailvl_trainer.data.encoder import TokenCounter
from sailvl_trainer.data.samples import Sample, build_caption_sample
from sailvl_trainer.data.shards import ShardInfo, ShardWriter, write_shard_manifest
from sailvl_trainer.errors import DataError, StorageError
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import Crew
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import decode, encode

READ_AHEAD = 64
"""Pictures in memory while a shard is written."""
T = TypeVar("T")


def list_all(context: Context, crew: Crew, parts: Parts) -> None:
    """Every container's items, written down: later passes and attempts see the same ones in the same order."""
    containers = parts.listed

    def do(number: int) -> None:
        write_items(parts.listing(number), _beat(context, list_items(containers[number])))

    crew.share("listing", len(containers), lambda number: parts.listing(number).exists(), do)


def verify_all(context: Context, crew: Crew, parts: Parts, config: CurateConfig) -> None:
    """Every item decoded, measured and hashed, unit by unit."""
    units, tile_size = parts.units, get_preset(context.stage.model.preset).image_size
    context.telemetry.update(steps=sum(unit.count for unit in units))

    def do(number: int) -> None:
        unit = units[number]
        items = read_items(parts.listing(unit.container), unit.first, unit.count)
        found = list(_beat(context, pool.map(lambda item: verify(item, config, tile_size), items)))
        _require_source(parts.listed[unit.container], found)
        write_rows(parts.unit(number), unit.item, items, found)

    with _quiet(), _threads() as pool:
        crew.share(
            "verifying", len(units), lambda number: parts.unit(number).exists(), do, lambda number: units[number].count
        )


def write_all(context: Context, crew: Crew, parts: Parts) -> None:
    """Every planned shard. Its information is written last, and a later attempt passes it over by that."""
    shards = decode(list[PlannedShard], parts.shards.read_bytes())
    counter = _counter(context)

    def do(number: int) -> None:
        shard = shards[number]
        with ShardWriter(context.files.output / shard.split, shard.name, counter) as writer:
            for sample, size in _beat(context, _read_samples(parts.plan, shard)):
                writer.write(sample, size)
        write_atomic(parts.shard_info(shard), encode(writer.info))

    crew.share("writing", len(shards), lambda number: parts.shard_info(shards[number]).exists(), do)


def write_manifests(context: Context, parts: Parts) -> None:
    """Of both splits, once all their shards are there; leftovers of killed attempts go."""
    shards = decode(list[PlannedShard], parts.shards.read_bytes())
    for split in (SHARDS_DIR, HELD_OUT_DIR):
        infos = [decode(ShardInfo, parts.shard_info(s).read_bytes()) for s in shards if s.split == split]
        write_shard_manifest(context.files.output / split, infos)
        for leftover in (context.files.output / split).glob(".*.tar.*"):
            leftover.unlink(missing_ok=True)


def _require_source(container: Container, found: list[Verified]) -> None:
    """Files may be missing; a whole source, which was there when it was listed, is the storage's failure."""
    is_missing = any(verified.outcome == "missing" for verified in found)
    if is_missing and container.path and not Path(container.path).exists():
        raise StorageError(
            f"source {container.source}: {container.path} was listed and is gone; see that its volume is mounted; "
            "what was verified before is kept"
        )


def _counter(context: Context) -> TokenCounter | None:
    """Counts positions for the training stages, where the run's vocabulary is known by now."""
    model = context.stage.model
    has_tokenizer = model.preset == "tiny" or model.language is not None
    return TokenCounter(tokenizer=load_tokenizer(model)) if has_tokenizer else None


def _read_samples(plan: Path, shard: PlannedShard) -> Iterator[tuple[Sample, tuple[int, int]]]:
    """A shard's samples, and their pictures' sizes, in the plan's order."""
    table = pq.read_table(plan, filters=[("split", "=", shard.split), ("shard", "=", shard.number)]).sort_by("place")
    with _threads() as pool:
        for first in range(0, table.num_rows, READ_AHEAD):
            some = table.slice(first, READ_AHEAD)
            for row, item, data in zip(some.to_pylist(), items := to_items(some), pool.map(_read, items), strict=True):
                key = f"{row['item']:09d}-{item.key}"
                sample = build_caption_sample(key, data, row["format"], row["text"], {"source": item.source})
                yield sample, (row["width"], row["height"])


def _read(item: Item) -> bytes:
    """The bytes of a verified item, which has to be there still."""
    try:
        data = read_item(item).data
    except OSError as error:
        raise DataError(f"{item.source}: {item.key} was verified and is gone: {error}; put it back") from error
    if item.size >= 0 and len(data) != item.size:
        raise DataError(f"{item.source}: {item.key} was verified and is cut off now; put its tar back")
    return data


def _beat(context: Context, things: Iterable[T]) -> Iterator[T]:
    """A heartbeat a thing."""
    for thing in things:
        yield thing
        context.telemetry.update()


def _threads() -> ThreadPoolExecutor:
    """As many threads as this rank has cores: decoding, resizing and hashing run outside of Python's lock."""
    return ThreadPoolExecutor(torch.get_num_threads())


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of odd metadata in pictures that it reads well: one line a picture helps nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
