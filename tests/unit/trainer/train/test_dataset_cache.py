"""Token counts of data counted by another tokenizer: one resumable pass of all ranks that reads no image."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailvl_trainer.contract import ExitCode, ModelConfig, Stage
from sailvl_trainer.data.dataset import ShardDataset, build_dataset, has_lengths, list_shards
from sailvl_trainer.data.encoder import SampleEncoder, TokenCounter
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.data.token_counts import TokenCountFiles
from sailvl_trainer.errors import Preempted, StorageError
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import claim_stage
from sailvl_trainer.train import dataset_cache
from sailvl_trainer.train.dataset_cache import HEARTBEAT_ROWS, INDEX_DIR, open_dataset
from tests.support.builders.training import build_set, build_set_of_another_tokenizer, build_stage
from tests.support.rank_faults import (
    FaultyRanks,
    Volume,
    combine_faults,
    fill_volume,
    inject_at,
    kill_process,
    log_counted,
    next_attempt,
    provide_volume,
)

SHARDS = 5


@pytest.fixture(scope="module")
def uncounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set_of_another_tokenizer(tmp_path_factory.mktemp("data") / "set", shards=SHARDS)


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return build_encoder()


def build_encoder() -> SampleEncoder:
    tokenizer = load_tokenizer(ModelConfig(preset="tiny"))
    return SampleEncoder(tokenizer=tokenizer, preset=get_preset("tiny"), max_tiles=1, pack_tokens=256)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Return the context of an attempt that has claimed its stage, as a rank does first."""
    context = build_single_process_context(build_stage(tmp_path), scratch=tmp_path / "scratch")
    claim_stage(context.files, context.stage.attempt)
    return context


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the shards whose tokens are counted, in order."""
    names: list[str] = []
    count_shard = TokenCounter.count_shard

    def count_and_note(self: TokenCounter, reader: ShardReader, *on_row: Callable[[int], None]) -> np.ndarray:
        tokens = count_shard(self, reader, *on_row)
        names.append(reader.path.stem)
        return tokens

    monkeypatch.setattr(TokenCounter, "count_shard", count_and_note)
    return names


def open_shards(context: Context, directory: Path, encoder: SampleEncoder) -> ShardDataset:
    return open_dataset(context, [directory], "shards", encoder)


def list_cache(context: Context) -> list[str]:
    return sorted(path.name for path in (context.files.output / INDEX_DIR).iterdir())


def test_shared_pass_gives_the_lengths_of_a_direct_count(
    context: Context, uncounted: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    dataset = open_shards(context, uncounted, encoder)
    assert counted == [f"{n:05d}" for n in range(SHARDS)]
    direct = build_dataset(list_shards([uncounted], "shards"), encoder)
    assert np.array_equal(dataset.lengths_S, direct.lengths_S)
    assert dataset.fingerprint == direct.fingerprint
    assert list_cache(context) == [f"shards-{dataset.fingerprint}.npy"], "the files of single shards are deleted"


def test_shards_counted_by_the_same_tokenizer_are_not_counted_again(
    context: Context, tmp_path: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    open_shards(context, build_set(tmp_path / "set"), encoder)
    assert counted == []


def test_later_start_maps_the_cache_and_opens_no_shard(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_shards(context, uncounted, encoder)
    monkeypatch.setattr(ShardReader, "__init__", lambda *_: pytest.fail("a shard was opened"))
    second = open_shards(context, uncounted, encoder)
    assert isinstance(second.lengths_S, np.memmap)
    assert np.array_equal(first.lengths_S, second.lengths_S)


def test_other_pack_length_is_measured_into_a_cache_of_its_own(
    context: Context, uncounted: Path, encoder: SampleEncoder
) -> None:
    datasets = [open_shards(context, uncounted, replace(encoder, pack_tokens=tokens)) for tokens in (256, 40)]
    assert [dataset.truncated_samples for dataset in datasets] == [0, len(datasets[1])]
    assert len(list_cache(context)) == 2


def test_counting_reads_no_image(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = spy_on_reads(monkeypatch)
    dataset = open_shards(context, uncounted, encoder)
    assert read == {"json": len(dataset)}


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the reads of the mapped tar by what is read: image or json."""
    read = Counter[str]()
    read_slice = ShardReader._slice

    def note_and_read(self: ShardReader, part: str, row: int) -> bytes:
        read[part] += 1
        return read_slice(self, part, row)

    monkeypatch.setattr(ShardReader, "_slice", note_and_read)
    return read


def test_heartbeats_continue_while_a_shard_is_counted(
    context: Context, tmp_path: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two heartbeats at most HEARTBEAT_ROWS samples are counted, however many the shard has."""
    events: list[str] = []
    count, update = TokenCounter.count, context.telemetry.update
    monkeypatch.setattr(
        TokenCounter, "count", lambda *args, **kwargs: (events.append("row"), count(*args, **kwargs))[1]
    )
    monkeypatch.setattr(context.telemetry, "update", lambda **changes: (events.append("beat"), update(**changes))[1])
    samples = 3 * HEARTBEAT_ROWS + 1
    open_shards(context, build_set_of_another_tokenizer(tmp_path / "large", shards=1, shard_samples=samples), encoder)
    assert events.count("row") == samples
    assert max(map(len, "".join("r" if e == "row" else "b" for e in events).split("b"))) <= HEARTBEAT_ROWS


def test_counting_time_is_recorded_as_starting_alone(context: Context, uncounted: Path, encoder: SampleEncoder) -> None:
    open_shards(context, uncounted, encoder)
    assert context.telemetry.progress.seconds.keys() == {"starting"}
    assert context.telemetry.progress.step == 0, "the operator would take counted samples for steps"


def count_some(
    context: Context, directory: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch, *, shards: int
) -> Path:
    """Fail after counting `shards` shards; return the folder of their files."""
    done: list[int] = []
    count = TokenCountFiles.count

    def count_or_fail(self: TokenCountFiles, *args: Any) -> None:
        if len(done) == shards:
            raise RuntimeError("killed")
        count(self, *args)
        done.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(TokenCountFiles, "count", count_or_fail)
        with pytest.raises(RuntimeError, match="killed"):
            open_shards(context, directory, encoder)
    (folder,) = (context.files.output / INDEX_DIR).iterdir()
    return folder


def test_start_after_a_killed_one_counts_only_the_remaining_shards(
    context: Context, uncounted: Path, encoder: SampleEncoder, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = count_some(context, uncounted, encoder, monkeypatch, shards=3)
    (folder.parent / f"{folder.name.removesuffix('-tokens')}.{'0' * 32}.tmp").touch()
    counted.clear()
    dataset = open_shards(context, uncounted, encoder)
    assert counted == ["00003", "00004"]
    assert len(list_cache(context)) == 1, "the temporary file of a killed start is deleted"
    assert np.array_equal(dataset.lengths_S, build_dataset(list_shards([uncounted], "shards"), encoder).lengths_S)


def test_superseded_attempt_deletes_no_file_of_a_later_one(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = count_some(context, uncounted, encoder, monkeypatch, shards=3)
    temporary = folder.parent / f"{folder.name.removesuffix('-tokens')}.{'0' * 32}.tmp"
    temporary.touch()
    claim_stage(context.files, context.stage.attempt + 1)
    open_shards(context, uncounted, encoder)
    assert temporary.exists()
    assert len(list(folder.iterdir())) == SHARDS


def alter(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def forge(data: bytes, count: int) -> bytes:
    """Return the file of other counts, with the hash that belongs to them."""
    payload = np.full((len(data) - 32) // 4, count, dtype="<i4").tobytes()
    return hashlib.sha256(payload).digest() + payload


DAMAGES = [
    pytest.param(lambda data: data[:-4], id="truncated by a row"),
    pytest.param(lambda data: data[:7], id="truncated within the hash"),
    pytest.param(lambda _: b"", id="empty"),
    pytest.param(alter, id="a flipped bit"),
    pytest.param(lambda data: data + data[-4:], id="one row too many"),
    pytest.param(lambda data: forge(data, -1), id="negative counts with their hash"),
]


@pytest.fixture
def partly_counted(context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a start that failed before the last shard."""
    return count_some(context, uncounted, encoder, monkeypatch, shards=SHARDS - 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_counted_again(
    damage: Callable[[bytes], bytes], partly_counted: Path, context: Context, uncounted: Path, counted: list[str]
) -> None:
    encoder = build_encoder()
    info = list_shards([uncounted], "shards").infos[1]
    path = partly_counted / f"{info.sha256}.tokens"
    path.write_bytes(damage(path.read_bytes()))
    counted.clear()
    dataset = open_shards(context, uncounted, encoder)
    assert counted == [info.name, "00004"]
    assert np.array_equal(dataset.lengths_S, build_dataset(list_shards([uncounted], "shards"), encoder).lengths_S)


def alter_first_row(data: bytes) -> bytes:
    """Flip a bit of the first sample's length, which follows the header of the array."""
    start = data.index(b"\n") + 1
    return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]


def write_unversioned(_: bytes) -> bytes:
    """Return an array of other fields without a hash, as an earlier version might have written it."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(8 * SHARDS, dtype=[("tokens", np.int32), ("is_cut", np.bool_)]))
    return buffer.getvalue()


def write_other_fields(_: bytes) -> bytes:
    data = write_unversioned(b"")
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="truncated"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(alter_first_row, id="a flipped bit"),
        pytest.param(write_unversioned, id="without a hash"),
        pytest.param(write_other_fields, id="other fields"),
    ],
)
def test_damaged_cache_is_measured_again(
    damage: Callable[[bytes], bytes], context: Context, uncounted: Path, encoder: SampleEncoder
) -> None:
    first = np.array(open_shards(context, uncounted, encoder).lengths_S)
    (name,) = list_cache(context)
    path = context.files.output / INDEX_DIR / name
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(open_shards(context, uncounted, encoder).lengths_S, first)
    assert has_lengths(path, len(first))


def test_full_volume_while_the_lengths_are_written_is_a_storage_error(
    context: Context, tmp_path: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space is allocated first: writing a map to a full volume would kill the process with SIGBUS."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match="is full"):
        open_shards(context, build_set(tmp_path / "set"), encoder)
    assert list_cache(context) == []


def test_superseded_attempt_whose_file_was_deleted_stops(
    context: Context, uncounted: Path, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_file(*_: object, **__: object) -> None:
        claim_stage(context.files, context.stage.attempt + 1)
        raise FileNotFoundError("deleted by the later attempt")

    monkeypatch.setattr(dataset_cache, "write_lengths", lose_file)
    with pytest.raises(Preempted, match="superseded"):
        open_shards(context, uncounted, encoder)


def test_stop_request_ends_counting_after_the_shard_in_progress(
    context: Context, tmp_path: Path, uncounted: Path, encoder: SampleEncoder, counted: list[str]
) -> None:
    (tmp_path / "scratch" / "stop").touch()
    with pytest.raises(Preempted):
        open_shards(context, uncounted, encoder)
    assert counted == []


def test_full_volume_while_counting_is_a_storage_error(
    volume: Volume, tmp_path: Path, uncounted: Path, encoder: SampleEncoder
) -> None:
    context = build_single_process_context(build_stage(volume.path), scratch=tmp_path / "scratch")
    fill_volume(volume.path)
    with pytest.raises(StorageError, match=rf"the volume {volume.path} is full"):
        open_shards(context, uncounted, encoder)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    yield from provide_volume(tmp_path, is_disk=False)


def read_log(path: Path) -> Counter[str]:
    return Counter(path.read_text().split())


ALL_ONCE = {f"shards/{n:05d}": 1 for n in range(SHARDS)} | {f"held-out/{SHARDS:05d}": 1}


def read_tokens(stage: Stage) -> int:
    return StageFiles(stage).read_result().tokens


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3], ids=["two ranks", "more ranks than held-out shards"])
def test_each_shard_is_counted_on_one_rank(world_size: int, tmp_path: Path, uncounted: Path) -> None:
    stage = build_stage(tmp_path / "storage", data=(str(uncounted),))
    ranks = FaultyRanks(stage, world_size, [partial(log_counted, tmp_path / "log")])
    assert ranks.wait_for_codes() == [0] * world_size, ranks.read_logs()
    assert read_log(tmp_path / "log") == ALL_ONCE
    lengths = build_lengths(uncounted)
    assert read_tokens(stage) == 2 * lengths["tokens"].sum(), "two epochs"


def build_lengths(directory: Path) -> np.ndarray:
    return build_dataset(list_shards([directory], "shards"), build_encoder()).lengths_S


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_others_and_the_next_attempt_counts_the_rest(
    rank: int, tmp_path: Path, uncounted: Path
) -> None:
    stage, log = build_stage(tmp_path / "storage", data=(str(uncounted),)), partial(log_counted, tmp_path / "log")
    faults: list[Callable[[], None]] = [log, log]
    faults[rank] = partial(combine_faults, log, inject_at("counting tokens", kill_process))
    ranks = FaultyRanks(stage, 2, faults)
    codes = ranks.wait_for_codes()
    assert codes[rank] == -signal.SIGKILL, ranks.read_logs()
    assert codes[1 - rank] in (76, -signal.SIGTERM), ranks.read_logs()
    second = FaultyRanks(next_attempt(stage), 2, [log])
    assert second.wait_for_codes() == [0, 0], second.read_logs()
    assert read_log(tmp_path / "log") == ALL_ONCE
    assert read_tokens(stage) == 2 * build_lengths(uncounted)["tokens"].sum()


@pytest.mark.slow
def test_volume_that_fills_up_while_counting_is_named(volume: Volume, uncounted: Path) -> None:
    stage = build_stage(volume.path, data=(str(uncounted),))
    ranks = FaultyRanks(stage, 2, [inject_at("counting tokens", partial(fill_volume, volume.path))])
    codes = ranks.wait_for_codes()
    assert ExitCode.STORAGE in codes, ranks.read_logs()
    failed = codes.index(ExitCode.STORAGE)
    assert f"the volume {volume.path} is full" in ranks.read_termination(failed).message
    (volume.path / "ballast").unlink()
    second = FaultyRanks(next_attempt(stage), 2)
    assert second.wait_for_codes() == [0, 0], second.read_logs()


@pytest.mark.slow
def test_ranks_share_the_verification_and_all_report_a_damaged_shard(tmp_path: Path) -> None:
    directory = build_set_of_another_tokenizer(tmp_path / "set", shards=SHARDS)
    path = directory / "shards/00003.tar"
    path.write_bytes(alter(path.read_bytes()))
    stage = build_stage(tmp_path / "storage", data=(str(directory),))
    ranks = FaultyRanks(stage, 2)
    assert ranks.wait_for_codes() == [ExitCode.DATA] * 2, ranks.read_logs()
    assert f"{path}: it has" in ranks.read_termination(0).message
    records = [line for file in StageFiles(stage).verified.iterdir() for line in file.read_text().splitlines()]
    assert len(records) == len(set(records)) == 2 * SHARDS - 1, "each intact file was read by one rank"
