"""A volume that is full, broken or unmounted during a stage: the message, what stays intact, and the retry."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sailvl_trainer.contract import ExitCode, Stage
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.builders.training import SAMPLES, build_set, build_stage
from tests.support.rank_faults import (
    BALLAST,
    FaultyRanks,
    Volume,
    fill_volume,
    inject_at,
    next_attempt,
    provide_volume,
    shut_down_volume,
    unmount_volume,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an undisturbed stage."""
    stage = build(tmp_path_factory.mktemp("whole") / "storage", data)
    return finish(stage)


def build(storage: Path, data: Path) -> Stage:
    return build_stage(storage, data=(str(data),))


def finish(stage: Stage) -> bytes:
    ranks = FaultyRanks(stage, 1)
    assert ranks.wait_for_codes() == [0], ranks.read_logs()
    return (StageFiles(stage).export / "model.safetensors").read_bytes()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Volume]:
    """A tmpfs of limited size."""
    yield from provide_volume(tmp_path, is_disk=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Volume]:
    """An ext4 volume that can be made to fail, and keeps what was synced."""
    yield from provide_volume(tmp_path, is_disk=True)


def assert_no_partial_files(stage: Stage, attempt: int) -> None:
    """Assert that no temporary file is left, and that each sample was used in both epochs."""
    files = StageFiles(stage)
    used = Counter(s for samples in read_trained_samples(files, attempt).values() for s in samples)
    assert used == dict.fromkeys(range(SAMPLES), 2)
    assert not [path for path in files.output.rglob("*") if ".tmp" in path.name or path.name.startswith(".")]


FILLED = [
    pytest.param(("verifying the data", None, r"verified/\S+"), id="record of verified files"),
    pytest.param(("measuring the data", None, r"index/\S+"), id="lengths cache"),
    pytest.param(("step 5", 3, r"step-00000006\S*"), id="checkpoint"),
    pytest.param(("export begun", 8, r"\.export\.\S+"), id="export"),
    pytest.param(("before the result", 8, r"result\.json"), id="result"),
]


@pytest.mark.parametrize("case", FILLED)
def test_full_volume_is_reported_and_a_retry_succeeds_once_space_is_freed(
    case: tuple[str, int | None, str], memory: Volume, data: Path, expected: bytes
) -> None:
    stage, (point, saved, path) = build(memory.path, data), case
    files = StageFiles(stage)
    ranks = FaultyRanks(stage, 1, [inject_at(point, partial(fill_volume, memory.path))])
    assert ranks.wait_for_codes() == [ExitCode.STORAGE], ranks.read_logs()
    pattern = rf"^the volume {memory.path} is full: \d+(\.\d)? [KM]?i?B of 64\.0 MiB free .* while writing \S*{path};"
    assert_matches(pattern, ranks.read_termination().message)
    newest = files.find_newest_checkpoint(1)
    assert (None if newest is None else newest.step) == saved
    assert files.find_result() is None

    second = next_attempt(stage)
    assert FaultyRanks(second, 1).wait_for_codes() == [ExitCode.STORAGE], "it is full still"
    (memory.path / BALLAST).unlink()
    assert finish(next_attempt(second)) == expected
    assert_no_partial_files(stage, 3)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


BROKEN = [
    pytest.param("step 5", shut_down_volume, id="training, I/O errors"),
    pytest.param("exporting", shut_down_volume, id="exporting, I/O errors"),
    pytest.param("step 5", unmount_volume, id="training, unmounted"),
    pytest.param("evaluating after", unmount_volume, id="evaluating, unmounted"),
]


@pytest.mark.parametrize(("point", "lose"), BROKEN)
def test_lost_volume_is_reported_and_a_retry_resumes_once_it_is_back(
    point: str, lose: object, disk: Volume, data: Path, expected: bytes
) -> None:
    stage = build(disk.path, data)
    ranks = FaultyRanks(stage, 1, [inject_at(point, partial(lose, disk.path))])  # type: ignore[call-overload]
    assert ranks.wait_for_codes() == [ExitCode.STORAGE], ranks.read_logs()
    assert_matches(
        rf"^the volume of {disk.path}\S* is unavailable .*; check that it is mounted", ranks.read_termination().message
    )
    disk.unmount()
    assert not os.listdir(disk.path), "nothing was written where it had been"
    disk.mount()
    assert finish(next_attempt(stage)) == expected
    assert_no_partial_files(stage, 2)
