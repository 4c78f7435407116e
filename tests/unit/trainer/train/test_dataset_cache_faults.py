"""The dataset cache after damage, on a full volume and with several ranks: what is intact is used again."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sailvl_trainer.contract import ExitCode, Stage
from sailvl_trainer.data.dataset import build_dataset, has_lengths, list_shards
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.errors import StorageError
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.dataset_cache import INDEX_DIR
from tests.support.builders.training import build_set, build_set_of_another_tokenizer, build_stage
from tests.support.dataset_cache import (
    SHARDS,
    build_encoder,
    count_some,
    list_cache,
    open_shards,
)
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
