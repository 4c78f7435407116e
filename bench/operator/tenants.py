"""`make bench-tenants`: how much a hostile tenant slows an honest one down, on fake nodes.

Failed pods of honest runs are replaced, first alone, then beside a tenant with hostile workers, forged objects, objects
as large as the API server takes, and churn. Prints a table, appends the figures to bench/history.jsonl, and prints the
JSON line last. Exits with status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from math import inf

from bench import history
from bench.operator import scenarios
from bench.operator.control_plane import LIMITS, NODE_KIND, ControlPlane
from bench.operator.hostile_churn import LARGE_WRITES, SMALL_WRITES, WRITES_PER_SECOND
from bench.operator.hostile_tenant import HostileScale, HostileTenant
from bench.operator.replicas import Replica
from bench.targets import Target, describe_result, format_targets
from sailvl_operator.cluster.progress import PROGRESS_WRITES_PER_SECOND
from sailvl_operator.errors import ApiError

RUNS = 300
"""Honest runs of two pods; a third of them fails in each of the two measurements."""
FAILURES_PER_SECOND = 5.0
DEFAULT_SCALE = HostileScale(runs=500, objects=60)
MEMORY_LIMIT_MIB = 512.0
"""Memory limit of the operator's pods in the chart's default values."""
NAMESPACES = 2
"""Namespaces with running attempts, which share the rate of reads of /progress."""
_START_SECONDS = 120.0
"""Longest time to wait for the standby, for the hostile runs to start, and for the first reads of their workers."""
_FIRST_SLOW_ANSWERS = 5
_GOGC = "100"
"""Go's default: with more, the API server would need several times the size of the large objects."""

TARGETS = (
    Target(
        figure="honest_p99_ratio",
        description="failed honest pod until next attempt's Job, p99, relative to without the hostile tenant",
        bound=2.0,
    ),
    Target(figure="rss_mib", description="peak resident memory of the leader, MiB", bound=MEMORY_LIMIT_MIB),
    Target(figure="standby_rss_mib", description="peak resident memory of the standby, MiB", bound=MEMORY_LIMIT_MIB),
    Target(figure="standby_ready", description="standbys that listed all objects", bound=1.0, is_minimum=True),
    Target(figure="operator_restarts", description="ends of the processes of both replicas", bound=0.0),
    Target(
        figure="honest_reads_ratio",
        description="reads of honest /progress, relative to alone or, if lower, to an equal share of the reads",
        bound=0.8,
        is_minimum=True,
    ),
    Target(
        figure="hostile_slow_answers",
        description="slow answers of hostile workers during the measurement",
        bound=10.0,
        is_minimum=True,
    ),
    Target(figure="hostile_refused", description="hostile objects that the API server refused", bound=0.0),
    Target(
        figure="hostile_started_ratio",
        description="part of the hostile runs, large ones included, that the operator started",
        bound=1.0,
        is_minimum=True,
    ),
    Target(
        figure="hostile_writes_per_s",
        description=f"forged objects created and deleted per second, out of {WRITES_PER_SECOND:.0f} tried",
        bound=WRITES_PER_SECOND / 2,
        is_minimum=True,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Times and reads while pods of honest runs failed."""

    replacements: list[float]
    """Sorted seconds from each failure until the Job of the next attempt; infinite if the operator failed."""
    reads_per_second: float
    """Requests to /progress of honest workers per second."""
    seconds: float
    """Duration of the measurement."""
    api_write_seconds: float
    """Median duration of a small write by another client: how much the API server itself is slowed down."""

    def percentile(self, percent: int) -> float:
        """Return a percentile of the replacements in seconds."""
        return scenarios.percentile(self.replacements, percent) if self.replacements[-1] < inf else inf


async def measure(scale: HostileScale) -> dict[str, float]:
    """Measure both halves on one control plane, and return the figures by name."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(ControlPlane(gogc=_GOGC))
        leader, standby = Replica(plane, 0), Replica(plane, 1)
        await stack.enter_async_context(leader)
        await scenarios.start_runs(plane, leader.operator, runs=RUNS, nodes=2, log=_log)
        alone = await _measure(plane, [leader])
        tenant = await stack.enter_async_context(HostileTenant(plane, scale, _log))
        await stack.enter_async_context(standby)
        is_standby_ready = await _await_attack(tenant, standby, scale)
        before, cpu_seconds = tenant.count_activity(), plane.cpu_seconds()
        beside = await _measure(plane, [leader, standby])
        activity = tenant.count_activity() - before
        parts = {name: round(seconds - cpu_seconds[name], 1) for name, seconds in plane.cpu_seconds().items()}
        started = await tenant.count_started()
    for refusal, count in Counter(refusal.partition(":")[0] for refusal in tenant.refusals).items():
        _log(f"{count} refused: {refusal}, such as {next(r for r in tenant.refusals if r.startswith(refusal))}")
    _log(f"activity of the hostile tenant in {beside.seconds:.0f} s: {dict(activity)}; CPU seconds: {parts}")
    return build_figures(alone, beside) | {
        "rss_mib": leader.peak_mib,
        "standby_rss_mib": standby.peak_mib,
        "standby_ready": float(is_standby_ready),
        "operator_restarts": float(leader.has_failed + standby.has_failed),
        "hostile_slow_answers": float(activity["slow answers"]),
        "hostile_refused": float(len(tenant.refusals)),
        "hostile_started_ratio": started / scale.count_runs(),
        "hostile_writes_per_s": sum(activity[kind] for kind in set(SMALL_WRITES)) / beside.seconds,
        "hostile_large_writes_per_s": sum(activity[kind] for kind in LARGE_WRITES) / beside.seconds,
    }


def build_figures(alone: Measurement, beside: Measurement) -> dict[str, float]:
    """Compare the measurement beside the hostile tenant with the one without it."""
    share = min(alone.reads_per_second, PROGRESS_WRITES_PER_SECOND / NAMESPACES)
    return {
        "honest_p99_ratio": beside.percentile(99) / alone.percentile(99),
        "honest_p99_alone_s": alone.percentile(99),
        "honest_p99_beside_s": beside.percentile(99),
        "honest_p50_alone_s": alone.percentile(50),
        "honest_p50_beside_s": beside.percentile(50),
        "honest_reads_alone_per_s": alone.reads_per_second,
        "honest_reads_beside_per_s": beside.reads_per_second,
        "api_write_p50_alone_s": alone.api_write_seconds,
        "api_write_p50_beside_s": beside.api_write_seconds,
        "honest_reads_ratio": beside.reads_per_second / share,
    }


async def _measure(plane: ControlPlane, replicas: Sequence[Replica]) -> Measurement:
    """Let pods of honest runs fail. If a replica ends or Jobs are not replaced in time, the times are infinite."""
    began, reads = time.monotonic(), plane.workers.reads
    replacing = asyncio.create_task(
        scenarios.measure_replacements(plane, failures=RUNS // 3, rate=FAILURES_PER_SECOND, attempt=1, log=_log)
    )
    writes = []
    while not replacing.done() and not any(replica.has_failed for replica in replicas):
        await asyncio.wait([replacing], timeout=0.5)
        writes.append(await _time_write(plane))
    replacing.cancel()
    [replacements] = await asyncio.gather(replacing, return_exceptions=True)
    if isinstance(replacements, BaseException):
        _log(f"not every failed pod was replaced: {type(replacements).__name__} {replacements}")
        replacements = [inf, inf]
    seconds = time.monotonic() - began
    return Measurement(
        replacements=replacements,
        reads_per_second=(plane.workers.reads - reads) / seconds,
        seconds=seconds,
        api_write_seconds=statistics.median(writes) if writes else inf,
    )


async def _time_write(plane: ControlPlane) -> float:
    """Return the seconds until a small write, of an object that the operator does not read, succeeds or fails."""
    began = time.monotonic()
    with suppress(ApiError):
        await plane.client.patch(NODE_KIND, "", "node-0", {"metadata": {"annotations": {"probe": str(began)}}})
    return time.monotonic() - began


async def _await_attack(tenant: HostileTenant, standby: Replica, scale: HostileScale) -> bool:
    """Wait until the standby is ready, every hostile run is started, and hostile workers are read; or for a limit.

    Return whether the standby is ready: if not, its memory lacks the objects that it has not listed.
    """
    slow_before = tenant.workers.slow_answers

    async def is_standby_ready() -> bool:
        return standby.has_failed or await asyncio.to_thread(standby.operator.is_ready)

    async def are_runs_started() -> bool:
        return await tenant.count_started() >= scale.count_runs()

    async def are_answers_slow() -> bool:
        return tenant.workers.slow_answers - slow_before >= _FIRST_SLOW_ANSWERS

    is_ready, _, _ = await asyncio.gather(
        _wait("the standby is ready", is_standby_ready),
        _wait("every hostile run is started", are_runs_started),
        _wait("hostile workers answer slowly", are_answers_slow),
    )
    return is_ready and not standby.has_failed


async def _wait(event: str, has_happened: Callable[[], Awaitable[bool]]) -> bool:
    """Wait for an event for at most _START_SECONDS, and return whether it has happened."""
    end = time.monotonic() + _START_SECONDS
    while not (happened := await has_happened()) and time.monotonic() < end:
        await asyncio.sleep(2)
    _log(event if happened else f"not within {_START_SECONDS:.0f} s: {event}")
    return happened


_began = time.monotonic()


def _log(message: str) -> None:
    """Print progress with the elapsed time to stderr."""
    print(f"[{time.monotonic() - _began:5.0f} s] {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Read the flags, measure, print, append to the history, and exit with status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    only = "; figures are recorded with the default numbers only"
    parser.add_argument("--hostile-runs", type=int, default=DEFAULT_SCALE.runs, help="runs with hostile workers" + only)
    parser.add_argument(
        "--hostile-objects", type=int, default=DEFAULT_SCALE.objects, help="objects of each kind" + only
    )
    args = parser.parse_args()
    scale = HostileScale(runs=args.hostile_runs, objects=args.hostile_objects)
    figures = asyncio.run(measure(scale))
    rounded = {key: round(value, 4) for key, value in figures.items()}
    if scale == DEFAULT_SCALE:
        history.append_record("tenants", rounded)
    print(f"\n{RUNS} honest runs of two pods, {scale.count_runs()} hostile ones; GOGC={_GOGC}; {LIMITS}\n")
    print(format_targets(TARGETS, figures))
    print("\n" + json.dumps(rounded))
    sys.exit(describe_result(TARGETS, figures))


if __name__ == "__main__":
    main()
