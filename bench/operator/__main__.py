"""`make bench-operator`: measure the operator at a thousand runs, beside a naive one, on fake nodes.

Prints a table, appends the figures to bench/history.jsonl, and prints the JSON line last. Exits with status 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from math import inf

from bench import history
from bench.operator import scenarios
from bench.operator.control_plane import GOGC, LIMITS, ControlPlane
from bench.operator.peers import NaiveKopf, SailVL
from bench.targets import Target, describe_result, format_targets

DEFAULT_RUNS = 1000
"""Runs created at once, as in the names of the figures."""
TARGETS = tuple(
    Target(figure=figure, description=description, bound=bound)
    for figure, description, bound in (
        ("jobs_written_1000_s", "runs created at once until all Jobs exist, fastest try", 10.0),
        ("pods_exist_1000_s", "the same until all pods exist", 25.0),
        ("start_10k_pods_s", "operator restart with ten pods per run until all runs are reconciled", 6.0),
        ("replace_p99_s", "failed pod until next attempt's Job, without settling time, p99", 1.0),
        ("noop_writes", "writes in a minute without changes", 0.0),
        ("noop_cpu_ratio", "CPU cores used in a minute without changes", 0.02),
        ("rss_mib", "peak resident memory with ten pods per run, MiB", 200.0),
        ("cpu_per_event_vs_kopf", "CPU time per event, relative to the naive operator", 0.2),
    )
)


@dataclass
class Report:
    """The figures by name, and notes for people."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def log(self, message: str) -> None:
        """Print progress with the elapsed time to stderr."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {message}", file=sys.stderr, flush=True)

    def show(self, runs: int) -> None:
        """Print the table of targets, the notes, and the figures as one line of JSON."""
        print(f"\n{runs} runs; GOGC={GOGC}; {LIMITS}\n")
        print(format_targets(TARGETS, self.figures))
        print("\n" + "\n".join(self.notes) + "\n")
        print(json.dumps({key: round(value, 4) for key, value in self.figures.items()}))


async def measure(runs: int, tries: int) -> Report:
    """Run every scenario, each on a control plane of its own."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGTERM, task.cancel
    )  # so that every started process is terminated
    report = Report()
    await _measure_starts(report, runs, tries)
    await _measure_peer(report, runs)
    await _measure_many_pods(report, runs)
    return report


async def _measure_starts(report: Report, runs: int, tries: int) -> None:
    """Measure the start with and without the operator in turn. Of times the shortest counts, because a machine is only
    ever slowed down; of CPU times the median."""
    starts, bare = [await _measure_life(report, runs)], [await _measure_bare(report, runs)]
    for _ in range(tries - 1):
        starts.append(await _measure_start(report, runs, SailVL))
        bare.append(await _measure_bare(report, runs))
    pods_s, bare_pods_s = min(start.pods_s for start in starts), min(bare)
    report.figures |= {
        "jobs_written_1000_s": min(start.jobs_s for start in starts),
        "pods_exist_1000_s": pods_s,
        "pods_exist_without_operator_1000_s": bare_pods_s,
        "cpu_per_event_vs_kopf": statistics.median(start.cpu_s / start.events for start in starts),
    }
    report.notes += [f"ours, try {number}: {_describe(start)}" for number, start in enumerate(starts, 1)]
    report.notes.append(
        f"control plane alone, given the same runs and Jobs: pods {_list_seconds(bare)}; "
        f"with the operator {_list_seconds([start.pods_s for start in starts])}, {pods_s / bare_pods_s:.2f} times that"
    )


async def _measure_start(report: Report, runs: int, peer: type[SailVL] | type[NaiveKopf]) -> scenarios.Start:
    async with ControlPlane() as plane:
        operator = peer(plane)
        await operator.start()
        try:
            return await scenarios.start_runs(plane, operator, runs=runs, nodes=2, log=report.log)
        finally:
            await operator.stop()


async def _measure_life(report: Report, runs: int) -> scenarios.Start:
    """Measure a start, a minute without changes, and failures on one control plane."""
    async with ControlPlane() as plane:
        operator = SailVL(plane)
        await operator.start()
        try:
            start = await scenarios.start_runs(plane, operator, runs=runs, nodes=2, log=report.log)
            writes = operator.writes()
            quiet_writes, ratio = await scenarios.measure_quiet(operator, report.log)
            some = max(2, runs // 5)
            spread = await scenarios.measure_replacements(plane, failures=some, rate=10.0, attempt=1, log=report.log)
            storm = await scenarios.measure_replacements(plane, failures=some, rate=inf, attempt=1, log=report.log)
        finally:
            await operator.stop()
    report.figures |= {
        "noop_writes": quiet_writes,
        "noop_cpu_ratio": ratio,
        "replace_p99_s": scenarios.percentile(spread, 99),
    }
    report.notes += [
        f"{writes / runs:.1f} writes per run, Events included",
        f"{some} replacements at 10 per second: {_spread(spread)}; {some} at once: {_spread(storm)}",
    ]
    return start


async def _measure_peer(report: Report, runs: int) -> None:
    start = await _measure_start(report, runs, NaiveKopf)
    report.figures["cpu_per_event_vs_kopf"] /= start.cpu_s / start.events
    report.figures["pods_exist_naive_1000_s"] = start.pods_s
    report.notes.append(f"naive kopf: {_describe(start)}")


async def _measure_bare(report: Report, runs: int) -> float:
    async with ControlPlane() as plane:
        return await scenarios.start_bare(plane, runs=runs, nodes=2, log=report.log)


async def _measure_many_pods(report: Report, runs: int) -> None:
    async with ControlPlane() as plane:
        operator = SailVL(plane)
        await operator.start()
        try:
            await scenarios.start_runs(plane, operator, runs=runs, nodes=10, log=report.log)
            started = operator.memory_mib()
            report.figures["start_10k_pods_s"] = await scenarios.measure_restart(
                plane, operator, runs=runs, log=report.log
            )
            await asyncio.sleep(10)
            report.figures["rss_mib"] = max(started, operator.memory_mib())
        finally:
            await operator.stop()


def _describe(start: scenarios.Start) -> str:
    """Return times and CPU time per event, with and without counting the operator's own status changes."""
    every = start.events + start.statuses
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.parts.items())
    return (
        f"Jobs {start.jobs_s:.1f} s, pods {start.pods_s:.1f} s (CPU: {parts}), CPU {start.cpu_s:.1f} s until quiet, "
        f"{1e3 * start.cpu_s / start.events:.2f} ms of CPU per event ({start.events}), "
        f"{1e3 * start.cpu_s / every:.2f} with its own status changes ({every})"
    )


def _list_seconds(values: list[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values) + " s"


def _spread(values: list[float]) -> str:
    p50, p99 = scenarios.percentile(values, 50), scenarios.percentile(values, 99)
    return f"p50 {p50:.2f} s, p99 {p99:.2f} s, longest {values[-1]:.2f} s"


def main() -> None:
    """Read the flags, measure, print, append to the history, and exit with status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=DEFAULT_RUNS, help="runs created at once; only the default is recorded"
    )
    parser.add_argument("--tries", type=int, default=3, help="starts of all runs; the shortest time counts")
    args = parser.parse_args()
    report = asyncio.run(measure(args.runs, args.tries))
    if args.runs == DEFAULT_RUNS:
        history.append_record("operator", {key: round(value, 4) for key, value in report.figures.items()})
    report.show(args.runs)
    sys.exit(describe_result(TARGETS, report.figures))


if __name__ == "__main__":
    main()
