"""`make bench-tenants`: how much a hostile tenant slows an honest one down, on fake nodes.

Failed pods of honest runs are replaced, first alone, then beside a tenant with hostile workers, forged Jobs and large
runs. Prints a table, appends the figures to bench/history.jsonl, and prints the JSON line last.
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
from math import inf

from bench import history
from bench.operator import scenarios
from bench.operator.control_plane import LIMITS, ControlPlane
from bench.operator.hostile_tenant import HostileTenant
from bench.operator.peers import SailVL, until

RUNS = 300
"""Honest runs of two pods; a third of them fails in each of the two measurements."""
FAILURES_PER_SECOND = 5.0
DEFAULT_HOSTILE_RUNS = 500
"""Hostile runs of two pods."""
MEMORY_LIMIT_MIB = 512.0
"""Memory limit of the operator's pod in the chart's default values."""
TARGETS = {"honest_p99_ratio": 2.0, "rss_mib": MEMORY_LIMIT_MIB, "operator_restarts": 0.0}
DESCRIPTIONS = {
    "honest_p99_ratio": "failed honest pod until next attempt's Job, p99, relative to without the hostile tenant",
    "rss_mib": "peak resident memory beside the hostile tenant, MiB",
    "operator_restarts": "ends of the operator's process",
}


async def measure(hostile_runs: int) -> dict[str, float]:
    """Measure both halves on one control plane, and return the figures by name."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with ControlPlane() as plane:
        operator = SailVL(plane)
        await operator.start()
        try:
            await scenarios.start_runs(plane, operator, runs=RUNS, nodes=2, log=_log)
            alone = await _measure_replacements(plane)
            async with HostileTenant(plane, hostile_runs) as tenant:
                refused = dict(Counter(refusal.partition(":")[0] for refusal in tenant.refusals))
                _log(f"{hostile_runs} hostile runs of two pods exist; refused: {refused}")
                await _await_reads(operator, 2 * hostile_runs)
                beside = await _measure_unless_ended(plane, operator)
                has_ended = operator.process.poll() is not None
                memory = 0.0 if has_ended else operator.memory_mib()
        finally:
            await operator.stop()
    p99_alone, p99_beside = scenarios.percentile(alone, 99), scenarios.percentile(beside, 99)
    return {
        "honest_p99_ratio": p99_beside / p99_alone,
        "honest_p99_alone_s": p99_alone,
        "honest_p99_beside_s": p99_beside,
        "honest_p50_alone_s": statistics.median(alone),
        "honest_p50_beside_s": statistics.median(beside),
        "rss_mib": memory,
        "operator_restarts": float(has_ended),
    }


async def _measure_replacements(plane: ControlPlane) -> list[float]:
    return await scenarios.measure_replacements(
        plane, failures=RUNS // 3, rate=FAILURES_PER_SECOND, attempt=1, log=_log
    )


async def _measure_unless_ended(plane: ControlPlane, operator: SailVL) -> list[float]:
    """Measure while the operator runs. If its process ends, return infinite times."""
    measuring = asyncio.create_task(_measure_replacements(plane))
    while not measuring.done() and operator.process.poll() is None:
        await asyncio.wait([measuring], timeout=1)
    if operator.process.poll() is None:
        return await measuring
    measuring.cancel()
    _log(f"the operator has ended with exit code {operator.process.poll()}")
    return [inf, inf]


async def _await_reads(operator: SailVL, reads: int) -> None:
    """Wait until the operator has sent so many requests to /progress, or for two minutes."""
    began, before = time.monotonic(), operator.progress_reads()
    await until(
        lambda: (
            operator.process.poll() is not None
            or operator.progress_reads() - before >= reads
            or time.monotonic() - began > 120
        ),
        150,
        pause=1.0,
    )
    _log(f"{operator.progress_reads() - before:.0f} reads of /progress since the hostile runs exist")


_began = time.monotonic()


def _log(message: str) -> None:
    """Print progress with the elapsed time to stderr."""
    print(f"[{time.monotonic() - _began:5.0f} s] {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Read the flags, measure, print, and append to the history."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--hostile-runs",
        type=int,
        default=DEFAULT_HOSTILE_RUNS,
        help="hostile runs of two pods; only the default is recorded",
    )
    args = parser.parse_args()
    figures = asyncio.run(measure(args.hostile_runs))
    if args.hostile_runs == DEFAULT_HOSTILE_RUNS:
        history.append_record("tenants", {key: round(value, 4) for key, value in figures.items()})
    print(f"\n{RUNS} honest runs of two pods, {args.hostile_runs} hostile ones; {LIMITS}\n")
    for key, target in TARGETS.items():
        value = figures[key]
        print(f"{'ok  ' if value <= target else 'MISS'} {DESCRIPTIONS[key]:<86} {value:>9.4g}   target ≤ {target:g}")
    print("\n" + json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
