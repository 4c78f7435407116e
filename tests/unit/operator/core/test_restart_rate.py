"""Restarts stay rare whatever the workers report: they can claim any cause of their end and any progress."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from sailvl_operator.api.status import ConditionType
from sailvl_operator.core.restart_policy import SHORT_ATTEMPT_SECONDS
from sailvl_trainer.contract import Checkpoint, ExitCode, Progress
from tests.support.builders.operator import SPEC
from tests.support.core_world import DEFAULTS, CoreWorld, run_to_active_stage

MAX_JOBS_PER_MINUTE, MAX_JOBS_PER_HOUR = 6, 20
TRAINING: dict[str, object] = {"stages": SPEC["stages"][2:3]}
PREEMPTED = int(ExitCode.PREEMPTED)


def report_progress(world: CoreWorld, step: int, **fields: int) -> None:
    active = run_to_active_stage(world)
    world.progress[active.name, active.attempt] = Progress(
        attempt=active.attempt, phase="running", step=step, checkpoint=Checkpoint(step=step, path=f"c/{step}"), **fields
    )


def end_workers(world: CoreWorld, code: int, **message: object) -> None:
    for pod in [p for p in world.pods.values() if p.terminated is None]:
        world.end_worker(pod.index, code, **message)


def exit_with(code: int, **message: object) -> Callable[[CoreWorld], None]:
    return lambda world: end_workers(world, code, **message)


def supersede_attempt(world: CoreWorld) -> None:
    end_workers(world, PREEMPTED, superseded_by=run_to_active_stage(world).attempt + 10_000)


def delete_job(world: CoreWorld) -> None:
    world.jobs = {name: replace(job, is_gone=True) for name, job in world.jobs.items()}
    world.pods = {}


def alter_job(world: CoreWorld) -> None:
    world.jobs = {name: replace(job, alteration="completions") for name, job in world.jobs.items()}


def evict_pods(world: CoreWorld) -> None:
    world.pods = {n: replace(p, disrupted="EvictionByEvictionAPI", is_gone=True) for n, p in world.pods.items()}


def start_attempts(world: CoreWorld, end: Callable[[CoreWorld], None], *, seconds: float) -> list[float]:
    """End each attempt at once, with a checkpoint that always grows; return the times at which Jobs were created."""
    times: list[float] = []
    until, step = world.now + seconds, 0
    while world.now < until and len(times) < 100 and not world.status.is_true(ConditionType.FAILED):
        world.run_until_stable()
        times += [world.now] * (len(world.started) - len(times))
        if not world.pods:
            continue
        step += 1
        report_progress(world, step)
        end(world)
    return times


ENDS = [
    *(
        pytest.param(exit_with(int(code)), id=f"exit code {int(code)}")
        for code in (*ExitCode, 1, 126, 137, 139)
        if code
    ),
    pytest.param(exit_with(0), id="success without a result"),
    pytest.param(supersede_attempt, id="a later attempt"),
    pytest.param(delete_job, id="deleted Job"),
    pytest.param(alter_job, id="altered Job"),
    pytest.param(evict_pods, id="evicted pods"),
]


@pytest.mark.parametrize("end", ENDS)
def test_attempts_that_end_at_once_start_rarely(end: Callable[[CoreWorld], None]) -> None:
    times = start_attempts(CoreWorld(spec=TRAINING), end, seconds=3600)
    most = max(sum(time <= other < time + 60 for other in times) for time in times)
    assert (most <= MAX_JOBS_PER_MINUTE, len(times) <= MAX_JOBS_PER_HOUR) == (True, True), times


def test_first_short_preemptions_are_not_delayed() -> None:
    times = start_attempts(CoreWorld(spec=TRAINING), exit_with(PREEMPTED), seconds=100)
    assert times[:4] == [1000.0] * 4
    assert times[4] >= 1000.0 + 8 * DEFAULTS.backoff_seconds


def test_preemption_of_a_long_attempt_is_never_delayed() -> None:
    world = CoreWorld(spec=TRAINING)
    for number in range(1, 20):
        report_progress(world, number)
        world.now += SHORT_ATTEMPT_SECONDS
        end_workers(world, PREEMPTED)
        before = world.now
        assert run_to_active_stage(world).attempt == number + 1
        assert world.now == before


def test_long_attempt_ends_the_backoff_of_short_ones() -> None:
    world = CoreWorld(spec=TRAINING)
    start_attempts(world, exit_with(PREEMPTED), seconds=600)
    assert run_to_active_stage(world).short_attempts > 3
    report_progress(world, 1000)
    world.now += SHORT_ATTEMPT_SECONDS
    end_workers(world, PREEMPTED)
    before = world.now
    assert (run_to_active_stage(world).short_attempts, world.now) == (0, before)


def test_checkpoint_beyond_the_last_step_resets_no_budget() -> None:
    world = CoreWorld(spec=TRAINING | {"restartPolicy": {"maxRestarts": 2}})
    for step in (10, 11, 12):
        report_progress(world, step, steps=10)
        world.now += SHORT_ATTEMPT_SECONDS
        end_workers(world, 1)
        world.run_until_stable()
    assert world.stage("knowledge").counted_restarts == {"Crash": 2}
