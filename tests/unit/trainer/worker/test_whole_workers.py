"""Whole workers as processes: what survives a kill, what a stop saves, what a wrong setting says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Env, Stage, Termination
from sailvl_trainer.demo.build_data import make_questions
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.builders import training
from tests.support.builders.worker import free_port

pytestmark = pytest.mark.slow
LIMIT = 120
"""Seconds that a worker may take."""


def build_stage(root: Path, *, name: str = "knowledge", attempt: int = 1) -> Stage:
    stage = training.build_stage(root, attempt=attempt, batch_tokens=1024, pack_tokens=512)
    return replace(stage, stage=name, digest=name, output=str(root / "demo" / name))


@dataclass
class Workers:
    """The workers of one attempt, on this machine."""

    root: Path
    stage: Stage
    nodes: int = 2

    def __post_init__(self) -> None:
        self.folder = self.root / f"{self.stage.stage}-{self.stage.attempt}"
        self.folder.mkdir()
        (self.folder / "stage.json").write_bytes(encode(self.stage))
        rendezvous, metrics = (free_port() for _ in range(2))
        self.processes = [self._start(index, rendezvous, metrics) for index in range(self.nodes)]

    def _start(self, index: int, rendezvous: int, metrics: int) -> subprocess.Popen[bytes]:
        environment = {
            Env.STAGE_FILE: self.folder / "stage.json",
            Env.NODES: self.nodes,
            Env.NODE_RANK: index,
            Env.RENDEZVOUS_PORT: rendezvous,
            Env.METRICS_PORT: metrics,
            Env.METRICS_PORT_OFFSET: index,
            Env.TERMINATION_LOG: self.folder / f"termination-{index}",
            Env.SCRATCH: self.folder / f"scratch-{index}",
            "OMP_NUM_THREADS": 1,
            "DS_ACCELERATOR": "cpu",
        }
        with (self.folder / f"log-{index}").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "sailvl_trainer"],
                env=os.environ | {k: str(v) for k, v in environment.items()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def await_step(self, step: int) -> None:
        """Until the stage has done so many steps."""
        path, until = self.folder / "scratch-0" / "progress.json", time.monotonic() + LIMIT
        while time.monotonic() < until:
            if path.exists() and json.loads(path.read_bytes())["step"] >= step:
                return
            assert self.processes[0].poll() is None, (self.folder / "log-0").read_text()[-2000:]
            time.sleep(0.02)
        pytest.fail(f"no step {step} within {LIMIT} s")

    def kill(self) -> None:
        """The first process of each, which is PID 1 in its container; nothing of it may live on."""
        for process in self.processes:
            process.kill()
            process.wait()

    def end(self) -> list[Termination]:
        """What each worker says when it has ended."""
        codes = [process.wait(LIMIT) for process in self.processes]
        said = [decode(Termination, (self.folder / f"termination-{i}").read_bytes()) for i in range(self.nodes)]
        assert [t.exit_code for t in said] == codes
        return said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("storage")
    make_questions(directory / "set", level=1, number=120)
    return directory


def weights(stage: Stage) -> bytes:
    return (StageFiles(stage).export / "model.safetensors").read_bytes()


def test_a_killed_attempt_is_gone_on_with_bit_for_bit(root: Path) -> None:
    whole = build_stage(root, name="whole")
    said = Workers(root, whole).end()
    assert said[0].result is not None
    steps = said[0].result.steps

    killed = build_stage(root, name="killed")
    first = Workers(root, killed)
    first.await_step(5)
    first.kill()
    second = Workers(root, replace(killed, attempt=2)).end()
    assert second[0].result is not None
    assert second[0].result.metrics == said[0].result.metrics

    assert weights(killed) == weights(whole)
    ledger = read_trained_samples(StageFiles(killed), last_attempt=2)
    assert sorted(ledger) == list(range(1, steps + 1))
    used = Counter(sample for samples in ledger.values() for sample in samples)
    assert used == Counter(dict.fromkeys(range(120), 2)), "two epochs: every sample twice"
    again = Workers(root, replace(killed, attempt=3)).end()
    assert again[0].result is not None
    assert again[0].result.reused


def test_a_killed_rank_ends_its_worker_and_its_neighbour(root: Path) -> None:
    stage = build_stage(root, name="crash")
    workers = Workers(root, stage)
    workers.await_step(2)
    children = Path(f"/proc/{workers.processes[1].pid}/task/{workers.processes[1].pid}/children").read_text().split()
    ranks = [p for p in map(int, children) if b"sailvl_trainer.rank.main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(ranks[0], signal.SIGKILL)
    said = workers.end()
    assert said[1].exit_code == 137
    assert said[0].exit_code != 0


def test_a_stop_saves_a_checkpoint_on_all_workers(root: Path) -> None:
    stage = build_stage(root, name="stop")
    workers = Workers(root, stage)
    workers.await_step(2)
    workers.processes[1].send_signal(signal.SIGTERM)
    said = workers.end()
    assert [t.exit_code for t in said] == [75, 75]
    saved = StageFiles(stage).find_newest_checkpoint(1)
    assert saved is not None
    assert saved in [t.checkpoint for t in said]


def test_a_wrong_setting_ends_at_once_and_says_what_to_change(root: Path) -> None:
    stage = build_stage(root, name="wrong")
    assert stage.train is not None
    wrong = replace(stage, train=replace(stage.train, data=(str(root / "nowhere"),)))
    (said,) = Workers(root, wrong, nodes=1).end()
    assert said.exit_code == 65
    assert "nowhere" in said.message
    assert "name a curate stage or a prepared set" in said.message
