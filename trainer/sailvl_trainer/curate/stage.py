"""The curate stage: verify in parallel, decide once, write shards in parallel, report once."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sailvl_trainer.contract import CurateConfig, Result
from sailvl_trainer.curate import report
from sailvl_trainer.curate.dedup import find_duplicates
from sailvl_trainer.curate.ingest import Item, list_items
from sailvl_trainer.curate.verify import as_columns, verify
from sailvl_trainer.curate.work import first_alone, part_path, share
from sailvl_trainer.data.images import read_size
from sailvl_trainer.data.samples import build_caption
from sailvl_trainer.data.shards import ShardInfo, ShardWriter, write_manifest
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.documents import decode, encode, write_atomic
from sailvl_trainer.runtime.errors import ConfigError, Preempted

UNIT = 128
"""Items a unit of verification."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedShard:
    split: str
    """shards or held-out."""
    name: str
    items: tuple[int, ...]


def run(context: Context) -> Result:
    """Carry the stage out; the shards are the same bytes whatever the number of ranks."""
    started, config = time.time(), context.stage.curate
    assert config is not None, "read_stage has checked the kind"
    items = [item for source in config.sources for item in list_items(source, context.stage.seed)]
    if not items:
        raise ConfigError(f"the sources hold no pictures: {[source.path for source in config.sources]}")
    parts = context.files.output / "parts"
    context.telemetry.update(phase="running", unit="samples", step=0, steps=len(items))
    _verify(context, items, config, parts)
    _stop_if_asked(context)
    with first_alone(context) as is_mine:
        if is_mine:
            _decide(context, config, parts)
    plan = decode(list[PlannedShard], (parts / "plan.json").read_bytes())
    share(
        context,
        "write",
        len(plan),
        lambda unit: _info_path(context, plan[unit]).exists(),
        lambda unit: _write_shard(context, plan[unit], items),
    )
    with first_alone(context) as is_mine:
        if is_mine:
            _finish(context, plan)
    return _result(context, plan, parts, time.time() - started)


def _verify(context: Context, items: list[Item], config: CurateConfig, parts: Path) -> None:
    units = -(-len(items) // UNIT)

    def do(unit: int) -> None:
        first = unit * UNIT
        rows = [verify(first + i, item, config) for i, item in enumerate(items[first : first + UNIT])]
        sink = io.BytesIO()
        pq.write_table(pa.table(as_columns(rows)), sink)
        write_atomic(part_path(parts, unit), sink.getvalue())
        for outcome, number in Counter(row.outcome for row in rows).items():
            context.telemetry.count_samples(outcome, number)
        context.telemetry.update(step=min(len(items), first + UNIT))

    share(context, "verify", units, lambda unit: part_path(parts, unit).exists(), do)


def _stop_if_asked(context: Context) -> None:
    if context.preemption.requested():
        raise Preempted("stopped on request between two passes; what is verified stays")


def _decide(context: Context, config: CurateConfig, parts: Path) -> None:
    """Duplicates, the held-out part by hash, and the order of the shards: once, over all rows."""
    rows = pq.read_table(parts / "rows", columns=["item", "key", "outcome", "source"]).to_pylist()
    repeats = find_duplicates(parts / "rows", exact=config.exact_duplicates, distance=config.perceptual_distance)
    kept = [
        row for row in sorted(rows, key=lambda r: r["item"]) if row["outcome"] == "ok" and row["item"] not in repeats
    ]
    split = {row["item"]: is_held_out(row["source"], row["key"], config.held_out_fraction) for row in kept}
    plan = [
        PlannedShard(split=name, name=f"{number:05d}", items=tuple(chosen[at : at + config.shard_samples]))
        for name, wanted in (("shards", False), ("held-out", True))
        for chosen in [[item for item, held in split.items() if held == wanted]]
        for number, at in enumerate(range(0, len(chosen), config.shard_samples))
    ]
    if not any(shard.split == "shards" for shard in plan):
        raise ConfigError(f"no picture of {len(rows)} was kept; the outcomes are {dict(_outcomes(rows, repeats))}")
    write_atomic(parts / "repeats.json", encode({str(item): found for item, found in repeats.items()}))
    write_atomic(parts / "plan.json", encode(plan))


def is_held_out(source: str, key: str, fraction: float) -> bool:
    """By a hash of the name: the same sample is held out in every run, however much data comes to it."""
    digest = hashlib.sha256(f"{source}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _write_shard(context: Context, shard: PlannedShard, items: list[Item]) -> None:
    """A shard and, once it is whole, its information, by which a restarted run passes it over."""
    with ShardWriter(context.files.output / shard.split, shard.name) as writer:
        for number in shard.items:
            item = items[number]
            data = item.read()
            caption = (item.caption or "").strip()
            key = f"{number:09d}-{item.key}"
            writer.write(build_caption(key, data, item.suffix, caption, {"source": item.source}), read_size(data))
            context.telemetry.update()
    write_atomic(_info_path(context, shard), encode(writer.info))


def _info_path(context: Context, shard: PlannedShard) -> Path:
    return context.files.output / "parts" / f"{shard.split}-{shard.name}.json"


def _finish(context: Context, plan: list[PlannedShard]) -> None:
    for split in ("shards", "held-out"):
        infos = [decode(ShardInfo, _info_path(context, s).read_bytes()) for s in plan if s.split == split]
        write_manifest(context.files.output / split, infos)
    report.write(context.files.output, context.files.report)


def _outcomes(rows: list[dict[str, object]], repeats: dict[int, tuple[str, int]]) -> Counter[str]:
    return Counter(repeats[row["item"]][0] if row["item"] in repeats else str(row["outcome"]) for row in rows)


def _result(context: Context, plan: list[PlannedShard], parts: Path, seconds: float) -> Result:
    rows = pq.read_table(parts / "rows", columns=["item", "outcome"]).to_pylist()
    repeats = {int(item): tuple(found) for item, found in json.loads((parts / "repeats.json").read_bytes()).items()}
    kept = sum(len(shard.items) for shard in plan)
    outcomes = {name: float(n) for name, n in sorted(_outcomes(rows, repeats).items()) if name != "ok"}
    held_out = sum(len(shard.items) for shard in plan if shard.split == "held-out")
    return Result(
        stage=context.stage.stage,
        kind="curate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative(context.files.output),
        steps=len(rows),
        samples=kept,
        seconds=seconds,
        metrics={"kept": float(kept), "dropped": float(len(rows) - kept), "heldOut": float(held_out)} | outcomes,
    )
