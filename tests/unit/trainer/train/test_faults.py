"""Two ranks of a training stage, killed or stopped at each point: the next attempt gives a bit-identical outcome."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from sailvl_trainer.contract import Result, Stage
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import find_newest_attempt
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.builders.training import SAMPLES, build_set, build_stage
from tests.support.rank_faults import (
    Fault,
    FaultyRanks,
    do_nothing,
    inject_at,
    kill_process,
    next_attempt,
    request_stop,
    stop_process,
)

pytestmark = pytest.mark.slow
STOPPED, LOST = 75, (76, -signal.SIGTERM)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    build_set(root / "set")
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> Stage:
    """A stage that was never interrupted."""
    stage = build_stage(root, run="whole")
    finish(stage)
    return stage


def finish(stage: Stage) -> None:
    ranks = FaultyRanks(stage)
    assert ranks.wait_for_codes() == [0, 0], ranks.read_logs()


def weights(stage: Stage) -> bytes:
    return (StageFiles(stage).export / "model.safetensors").read_bytes()


def outcome(stage: Stage) -> tuple[int, int, int, dict[str, float]]:
    result: Result = StageFiles(stage).read_result()
    return result.steps, result.tokens, result.samples, result.metrics


def assert_same_outcome(stage: Stage, whole: Stage, attempt: int) -> None:
    """Assert bit-identical weights and result, and that each sample was used in both epochs."""
    assert weights(stage) == weights(whole)
    assert outcome(stage) == outcome(whole)
    used = Counter(s for samples in read_trained_samples(StageFiles(stage), attempt).values() for s in samples)
    assert used == dict.fromkeys(range(SAMPLES), 2)


KILLS = [
    pytest.param("starting", 1, None, id="starting"),
    pytest.param("evaluating before", 0, None, id="before its first step"),
    pytest.param("step 5", 1, 3, id="training"),
    pytest.param("saving, with half-written files", 1, 3, id="saving, one file written"),
    pytest.param(
        "saving, complete but before older ones are deleted", 0, 6, id="saving, before old checkpoints are deleted"
    ),
    pytest.param("evaluating after", 1, 8, id="evaluating"),
    pytest.param("exporting", 0, 8, id="exporting, folder incomplete"),
    pytest.param("before the result", 0, 8, id="before its result"),
]


@pytest.mark.parametrize(("point", "rank", "saved"), KILLS)
def test_outcome_after_a_killed_rank_is_identical(
    point: str, rank: int, saved: int | None, root: Path, whole: Stage
) -> None:
    stage = build_stage(root, run=f"killed-{point}")
    faults: list[Fault] = [do_nothing, do_nothing]
    faults[rank] = inject_at(point, kill_process)
    ranks = FaultyRanks(stage, faults=faults)
    codes = ranks.wait_for_codes()
    assert codes[rank] == -signal.SIGKILL, ranks.read_logs()
    assert codes[1 - rank] in LOST, ranks.read_logs()
    newest = StageFiles(stage).find_newest_checkpoint(1)
    assert (None if newest is None else newest.step) == saved
    finish(next_attempt(stage))
    assert_same_outcome(stage, whole, attempt=2)


def test_rank_killed_before_the_result_is_shared_has_a_result(root: Path, whole: Stage) -> None:
    stage = build_stage(root, run="killed-memo")
    ranks = FaultyRanks(stage, faults=[inject_at("before the result pointer", kill_process), do_nothing])
    assert ranks.wait_for_codes()[0] == -signal.SIGKILL
    finish(next_attempt(stage))
    assert find_newest_attempt(StageFiles(stage)) == 1, "the next attempt found it"
    assert_same_outcome(stage, whole, attempt=1)


STOPS = [
    pytest.param("evaluating before", STOPPED, None, id="before its first step"),
    pytest.param("step 5", STOPPED, 5, id="training"),
    pytest.param("saving, with half-written files", STOPPED, 6, id="saving: the step is not saved twice"),
    pytest.param("step 8", STOPPED, 8, id="in the last step"),
    pytest.param("evaluating after", STOPPED, 8, id="evaluating"),
    pytest.param("export begun", 0, 8, id="exporting: the stage finishes"),
]


@pytest.mark.parametrize(("point", "code", "saved"), STOPS)
def test_outcome_after_a_stop_request_is_identical(
    point: str, code: int, saved: int | None, root: Path, whole: Stage
) -> None:
    """Only one of the ranks receives the request."""
    stage = build_stage(root, run=f"stopped-{point}")
    ranks = FaultyRanks(stage, faults=[do_nothing, inject_at(point, request_stop)])
    assert ranks.wait_for_codes() == [code, code], ranks.read_logs()
    newest = StageFiles(stage).find_newest_checkpoint(1)
    assert (None if newest is None else newest.step) == saved
    if code:
        assert [ranks.read_termination(n).checkpoint for n in (0, 1)] == [newest, newest]
        finish(next_attempt(stage))
    assert_same_outcome(stage, whole, attempt=2 if code else 1)


LIVES_ON = [
    pytest.param("step 2", "step 7", id="before its first checkpoint"),
    pytest.param("step 4", "step 7", id="between two checkpoints"),
    pytest.param("exporting", "evaluating before", id="while exporting"),
    pytest.param("exported", "evaluating before", id="before writing the result"),
]


@pytest.mark.parametrize(("point", "later"), LIVES_ON)
def test_superseded_attempt_that_continues_changes_nothing(point: str, later: str, root: Path, whole: Stage) -> None:
    """Its first rank is paused at a point, the next attempt at a later one; then the superseded one continues."""
    stage = build_stage(root, run=f"cut-off-{point}", keep_checkpoints=1)
    first = FaultyRanks(stage, faults=[inject_at(point, stop_process), do_nothing])
    await_stopped(first)
    files = StageFiles(stage)
    second = FaultyRanks(next_attempt(stage), faults=[inject_at(later, stop_process), do_nothing])
    await_stopped(second)
    listed = tree(files)
    signal_first(first, signal.SIGCONT)
    codes = first.wait_for_codes()
    assert codes[0] == STOPPED, first.read_logs()
    assert "attempt 2 has claimed the stage" in first.read_termination().message
    assert tree(files) == listed, "it neither wrote nor deleted a file"
    signal_first(second, signal.SIGCONT)
    assert second.wait_for_codes() == [0, 0], second.read_logs()
    assert_same_outcome(stage, whole, attempt=2)
    assert files.read_result().attempt == 2


def tree(files: StageFiles) -> set[str]:
    """List the files that attempts share, without temporary exports."""
    found = {str(path.relative_to(files.output)) for path in files.output.rglob("*")}
    return {name for name in found if ".export." not in name}


def await_stopped(ranks: FaultyRanks) -> None:
    process = ranks.processes[0]
    path = Path(f"/proc/{process.pid}/stat")
    for _ in range(1200):
        assert process.is_alive(), ranks.read_logs()
        if path.read_text().rpartition(")")[2].split()[0] == "T":
            return
        process.join(0.05)
    pytest.fail(ranks.read_logs())


def signal_first(ranks: FaultyRanks, number: signal.Signals) -> None:
    pid = ranks.processes[0].pid
    assert pid is not None
    os.kill(pid, number)
