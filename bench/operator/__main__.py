"""`make bench-operator`: our operator at a thousand runs, beside a naive one, on a control plane with fake nodes.

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from math import inf

import scenarios
from peers import NaiveKopf, SailVL

from control_plane import FLAGS, ControlPlane

TARGETS = {
    "jobs_written_1000_s": 10.0,
    "pods_exist_1000_s": 25.0,
    "start_10k_pods_s": 6.0,
    "replace_p99_s": 1.0,
    "noop_writes": 0.0,
    "noop_cpu_ratio": 0.02,
    "rss_mib": 200.0,
    "cpu_per_event_vs_kopf": 0.2,
}
"""Each is met by what isn't more."""

WORDS = {
    "jobs_written_1000_s": "runs created at once → all their Jobs",
    "pods_exist_1000_s": "… → all their pods",
    "start_10k_pods_s": "fresh start with ten pods a run → every run looked at",
    "replace_p99_s": "failed pod → next attempt's Job, beyond the settling time, p99",
    "noop_writes": "writes in a quiet minute",
    "noop_cpu_ratio": "part of a core in a quiet minute",
    "rss_mib": "most resident memory, with ten pods a run",
    "cpu_per_event_vs_kopf": "CPU an event that others cause, as a part of the naive operator's",
}


@dataclass
class Report:
    """Figures by key, and what else is worth reading."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def log(self, words: str) -> None:
        """Progress, to people."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {words}", file=sys.stderr, flush=True)

    def show(self, runs: int) -> None:
        """The table, the notes, the line."""
        flags = "; ".join(f"{name}: {' '.join(given)}" for name, given in FLAGS.items())
        print(f"\n{runs} runs; {flags}\n")
        for key, target in TARGETS.items():
            value = self.figures[key]
            print(f"{'ok  ' if value <= target else 'MISS'} {WORDS[key]:<66} {value:>9.4g}   wanted ≤ {target:g}")
        print("\n" + "\n".join(self.notes) + "\n")
        print(json.dumps({key: round(self.figures[key], 4) for key in TARGETS}))


async def measure(runs: int) -> Report:
    """Every scenario, each on a control plane of its own."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing that was started stays
    report = Report()
    await _measure_start(report, runs)
    await _measure_peer(report, runs)
    await _measure_bare(report, runs)
    await _measure_many_pods(report, runs)
    return report


async def _measure_start(report: Report, runs: int) -> None:
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
        "jobs_written_1000_s": start.jobs_s,
        "pods_exist_1000_s": start.pods_s,
        "noop_writes": quiet_writes,
        "noop_cpu_ratio": ratio,
        "replace_p99_s": scenarios.percentile(spread, 99),
        "cpu_per_event_vs_kopf": start.cpu_s / start.events,
    }
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.parts.items())
    report.notes += [
        f"the runs themselves were created in {start.runs_s:.1f} s; {writes / runs:.1f} writes a run, events included",
        f"CPU seconds until all pods existed: operator {start.cpu_s:.1f} (until quiet), {parts}",
        f"{some} replacements at 10 a second: {_spread(spread)}; {some} at once: {_spread(storm)}",
        f"ours: {_describe(start)}",
    ]


async def _measure_peer(report: Report, runs: int) -> None:
    async with ControlPlane() as plane:
        peer = NaiveKopf(plane)
        await peer.start()
        try:
            start = await scenarios.start_runs(plane, peer, runs=runs, nodes=2, log=report.log)
        finally:
            await peer.stop()
    report.figures["cpu_per_event_vs_kopf"] /= start.cpu_s / start.events
    report.notes.append(
        f"naive kopf: Jobs {start.jobs_s:.1f} s, pods {start.pods_s:.1f} s, CPU {start.cpu_s:.1f} s; {_describe(start)}"
    )


async def _measure_bare(report: Report, runs: int) -> None:
    async with ControlPlane() as plane:
        jobs_s, pods_s = await scenarios.start_bare(plane, runs=runs, nodes=2, log=report.log)
    ratio = report.figures["pods_exist_1000_s"] / pods_s
    report.notes.append(
        f"without any operator, runs and the same Jobs made here: Jobs {jobs_s:.1f} s, pods {pods_s:.1f} s; "
        f"with it pods took {ratio:.2f} times that"
    )


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
    """CPU by two counts of events."""
    events, every = start.events, start.events + start.statuses
    return (
        f"{1e3 * start.cpu_s / events:.2f} ms of CPU an event ({events}), "
        f"{1e3 * start.cpu_s / every:.2f} with those of its own statuses ({every})"
    )


def _spread(values: list[float]) -> str:
    p50, p99 = scenarios.percentile(values, 50), scenarios.percentile(values, 99)
    return f"p50 {p50:.2f} s, p99 {p99:.2f} s, longest {values[-1]:.2f} s"


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="runs at once; the keys' names are those of 1000")
    runs = parser.parse_args().runs
    asyncio.run(measure(runs)).show(runs)


main()
