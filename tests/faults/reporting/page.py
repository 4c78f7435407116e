"""Writes the page on faults from the reports in build/faults: tables, plots and what kubectl printed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tests.faults.environment.volumes import FOLDER
from tests.faults.injections.catalogue import FAULTS, NONE
from tests.faults.reporting.plots import draw_time_bars
from tests.faults.reporting.table import (
    HEAD,
    ReportDocument,
    build_goodput_table,
    build_markdown,
    build_rows,
    read_reports,
)
from tests.support.live.cluster import ROOT

PLOTS = FOLDER / "pictures"
_CHAOS_RESULT = FOLDER / "chaos-result.json"
_INTRO = """# What faults do to a run

`make faults` runs a small recipe with one stage of each kind, two workers each, on the two nodes of `make cluster`.
In the middle of every stage it injects a real fault, and lets the run continue to its end. It takes about eighty
minutes and writes this page. There are {cells} cases, one fault in one stage each, measured on {days} on a machine
with {cores} CPU cores.{missing}

- *Recovered*: seconds from the fault until the stage's workers did a step again. *Progressed*: until they did a
  step that had not been done before. Both include the fault's own duration, such as a grace period or the time for
  which a disk was full.
- *Repeated*: steps, images or questions that had to be done again, according to the stage's sample log.
- *Duplicate, missing*: samples that the result used too often, or not at all.
- *Same result*: whether weights, shards or answers are those of an undisturbed run, byte for byte. *Skipped* are
  the samples of the step that produced a NaN, which the stage's result reports, too.
- *Counted*: the restart budgets that the failure was counted against. Restarts in place count against none, and
  fail no attempt.
"""
_GOODPUT = """![One bar per run: its time by goodput bucket, with the faults as marks.](pictures/faults.png)

## Goodput

The operator's account of each run's time in seconds, beside the wall clock; and the lost steps that it reports,
beside those counted from the stages' sample logs.
"""
_CHAOS = """## Chaos

{faults} faults at random times of {runs} runs within {minutes:g} minutes, drawn from seed {seed}, some in bursts
and some before the run had recovered from another. They hit ranks, workers, kubelets, nodes, disks, Jobs, Services,
operators, the API server and etcd. Every run ended with the weights, shards and answers of an undisturbed one, bit
for bit, with no sample doubled or missing, and with a goodput account within 1 % of the wall clock. `make chaos`
repeats it with any seed.

![Progress of the runs' stages over time, with the faults as marks.](pictures/chaos.png)
"""
_DETAILS = """## What kubectl printed

Lines of `kubectl get svr` from the fault until the stage had progressed beyond it, with the seconds since the
fault, and the messages of the failures.
"""


def write_page() -> None:
    """Write faults.md and its plot from all reports so far."""
    reports = read_reports([fault.name for fault in (NONE, *FAULTS)])
    undisturbed = next((report for report in reports if report["name"] == "none"), {"audits": {}})
    rows = [row for report in reports for row in build_rows(report, undisturbed)]
    measured = {report["name"] for report in reports}
    intro = build_intro(reports, [fault.title for fault in (NONE, *FAULTS) if fault.name not in measured])
    details = [build_details(report) for report in reports if report["effects"]]
    tables = [build_markdown(HEAD, rows), _GOODPUT, build_goodput_table(reports)]
    parts = [intro, *tables, *build_chaos_section(), _DETAILS, *details]
    PLOTS.mkdir(parents=True, exist_ok=True)
    draw_time_bars(PLOTS / "faults.png", reports)
    (FOLDER / "faults.md").write_text("\n".join(parts).replace(f"{ROOT}/", "/"))


def record_chaos(*, seed: int, minutes: float, faults: int, runs: int) -> None:
    """Store the figures of a chaos test that passed, for the page."""
    _CHAOS_RESULT.write_text(json.dumps({"seed": seed, "minutes": minutes, "faults": faults, "runs": runs}))


def build_chaos_section() -> list[str]:
    """Return the section on the last complete chaos test, or nothing if there is none."""
    return [_CHAOS.format(**json.loads(_CHAOS_RESULT.read_text()))] if _CHAOS_RESULT.exists() else []


def build_intro(reports: Sequence[ReportDocument], missing: Sequence[str]) -> str:
    """Return the introduction with the dates of the reports and the faults that have none."""
    paths = [FOLDER / f"{report['name']}.json" for report in reports]
    days = {datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d") for path in paths}
    return _INTRO.format(
        cells=sum(len(report["effects"]) for report in reports),
        days=" and ".join(sorted(days)),
        cores=os.cpu_count(),
        missing=f" Not measured yet: {'; '.join(missing)}." if missing else "",
    )


def build_details(report: ReportDocument) -> str:
    """Return what kubectl printed and the messages of the failures, by stage."""
    lines = ["<details>", f"<summary>{report['title']}</summary>", ""]
    for effect in report["effects"]:
        lines += [
            f"{effect['kind']}, injected at step {effect['step']}:",
            "",
            "```",
            *map(format_row, effect["printed_rows"]),
            "```",
            "",
        ]
        messages = [f"- {f['cause']}: {join_lines(f.get('message', ''))}" for f in effect["failures"]]
        messages += [f"- Stuck: {join_lines(stuck)}" for stuck in effect["stuck"]]
        lines += [*messages, ""] if messages else []
    return "\n".join([*lines, "</details>", ""])


def format_row(row: tuple[float, dict[str, Any]]) -> str:
    """Return the seconds since the fault and the cells that kubectl printed."""
    at, columns = row
    return f"{at:7.1f} s  " + "  ".join(filter(None, columns.values()))


def join_lines(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())
