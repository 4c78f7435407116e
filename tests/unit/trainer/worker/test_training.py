"""Workers that run a real training stage: kills, stops and invalid settings."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Stage
from sailvl_trainer.demo.build_data import make_questions
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.builders import training
from tests.support.worker_processes import TRAINER, WorkerProcesses

pytestmark = pytest.mark.slow
Start = Callable[..., WorkerProcesses]


def build_stage(root: Path, *, name: str, attempt: int = 1) -> Stage:
    stage = training.build_stage(root, attempt=attempt, batch_tokens=1024, pack_tokens=512)
    return replace(stage, stage=name, digest=name, output=str(root / "demo" / name))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a storage with a data set of 120 samples."""
    directory = tmp_path_factory.mktemp("storage")
    make_questions(directory / "set", level=1, number=120)
    return directory


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Return a function that starts the workers of a stage."""

    def start(stage: Stage, nodes: int = 2) -> WorkerProcesses:
        folder = root / f"{stage.stage}-{stage.attempt}"
        folder.mkdir()
        workers = WorkerProcesses(
            folder=folder, stage=stage, resources=resources, nodes=nodes, rank_module=TRAINER, timeout_seconds=120
        )
        workers.start_all()
        return workers

    with ExitStack() as resources:
        yield start


def read_weights(stage: Stage) -> bytes:
    return (StageFiles(stage).export / "model.safetensors").read_bytes()


def test_attempt_after_a_kill_resumes_bit_for_bit(root: Path, start: Start) -> None:
    whole = build_stage(root, name="whole")
    uninterrupted = start(whole).wait_for_all()
    assert uninterrupted[0].result is not None
    steps = uninterrupted[0].result.steps

    killed = build_stage(root, name="killed")
    first = start(killed)
    first.wait_for_step(5)
    first.kill_all()
    second = start(replace(killed, attempt=2)).wait_for_all()
    assert second[0].result is not None
    assert second[0].result.metrics == uninterrupted[0].result.metrics

    assert read_weights(killed) == read_weights(whole)
    ledger = read_trained_samples(StageFiles(killed), last_attempt=2)
    assert sorted(ledger) == list(range(1, steps + 1))
    used = Counter(sample for samples in ledger.values() for sample in samples)
    assert used == Counter(dict.fromkeys(range(120), 2)), "two epochs: every sample twice"
    third = start(replace(killed, attempt=3)).wait_for_all()
    assert third[0].result is not None
    assert third[0].result.reused


def test_killed_rank_ends_its_worker_and_its_peer(root: Path, start: Start) -> None:
    workers = start(build_stage(root, name="crash"))
    workers.wait_for_step(2)
    os.kill(workers.find_ranks(1)[0], signal.SIGKILL)
    ended = workers.wait_for_all()
    assert ended[1].exit_code == 137
    assert ended[0].exit_code != 0


def test_stop_of_one_worker_saves_a_checkpoint_on_all(root: Path, start: Start) -> None:
    stage = build_stage(root, name="stop")
    workers = start(stage)
    workers.wait_for_step(2)
    workers.processes[1].terminate()
    ended = workers.wait_for_all()
    assert [termination.exit_code for termination in ended] == [75, 75]
    saved = StageFiles(stage).find_newest_checkpoint(1)
    assert saved is not None
    assert saved in [termination.checkpoint for termination in ended]


def test_missing_data_ends_the_worker_with_advice(root: Path, start: Start) -> None:
    stage = build_stage(root, name="wrong")
    assert stage.train is not None
    invalid = replace(stage, train=replace(stage.train, data=(str(root / "nowhere"),)))
    (ended,) = start(invalid, nodes=1).wait_for_all()
    assert ended.exit_code == 65
    assert "nowhere" in ended.message
    assert "set the output of a curate stage or a prepared data set" in ended.message
