"""The page on faults, of the reports in build/faults: words, table, picture, ledger and all that kubectl said."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tests.faults.catalogue import FAULTS, NONE
from tests.faults.picture import draw_table
from tests.faults.table import HEAD, Report, build_ledger, build_markdown, build_rows, read_reports
from tests.faults.volumes import FOLDER
from tests.support.live.cluster import ROOT

PICTURES = FOLDER / "pictures"
_CHAOS_NOTE = FOLDER / "chaos-result.json"
_INTRO = """# What faults do to a run

`make faults` runs a small recipe with one stage of each kind, two workers each, on the two nodes of `make cluster`.
In the middle of every stage it injects a real fault, and lets the run continue to its end. It takes about eighty
minutes and writes this page. There are {cells} cases, one fault in one stage each, measured on {days} on a machine
with {cores} CPU cores.{missing}

- *Recovered*: seconds from the fault until the stage's workers did a step again. *Progressed*: until they did a
  step that had not been done before. Both include the fault's own duration, such as a grace period or the time for
  which a disk was full.
- *Repeated*: steps, images or questions that had to be done again, according to the stage's sample log.
- *Doubled, missing*: samples that the result used too often, or not at all.
- *Same result*: whether weights, shards or answers are those of an undisturbed run, byte for byte. *Skipped* are
  the samples of the step that produced a NaN, which the stage's result reports, too.
- *Counted*: the restart budgets that the failure was counted against. Restarts in place count against none, and
  fail no attempt.
"""
_PICTURE = """![One bar per run: its time by goodput bucket, with the faults as marks.](pictures/faults.png)

## Goodput

The operator's account of each run's time in seconds, beside the wall clock; and the lost steps that it reports,
beside those counted from the stages' sample logs.
"""
_CHAOS = """## Chaos

{strikes} faults at random times of {runs} runs within {minutes:g} minutes, drawn from seed {seed}, some in bursts
and some before the run had recovered from another. They hit ranks, workers, kubelets, nodes, disks, Jobs, Services,
operators, the API server and etcd. Every run ended with the weights, shards and answers of an undisturbed one, bit
for bit, with no sample doubled or missing, and with a goodput account within 1 % of the wall clock. `make chaos`
repeats it with any seed.

![Progress of the runs' stages over time, with the faults as marks.](pictures/chaos.png)
"""
_STORIES = """## What kubectl said

Lines of `kubectl get svr` from the fault until the stage had progressed beyond it, with the seconds since the
fault, and the messages of the failures.
"""


def write_page() -> None:
    """faults.md and its picture, of what has been played so far."""
    reports = read_reports([fault.name for fault in (NONE, *FAULTS)])
    undisturbed = next((report for report in reports if report["name"] == "none"), {"books": {}})
    rows = [row for report in reports for row in build_rows(report, undisturbed)]
    played = {report["name"] for report in reports}
    intro = build_intro(reports, [fault.words for fault in (NONE, *FAULTS) if fault.name not in played])
    stories = [build_story(report) for report in reports if report["cells"]]
    parts = [intro, build_markdown(HEAD, rows), _PICTURE, build_ledger(reports), *build_chaos(), _STORIES, *stories]
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_table(PICTURES / "faults.png", reports)
    (FOLDER / "faults.md").write_text("\n".join(parts).replace(f"{ROOT}/", "/"))


def note_chaos(*, seed: int, minutes: float, strikes: int, runs: int) -> None:
    """That a chaos was played and changed nothing."""
    _CHAOS_NOTE.write_text(json.dumps({"seed": seed, "minutes": minutes, "strikes": strikes, "runs": runs}))


def build_chaos() -> list[str]:
    """Of the last one that was played to its end; nothing, if none was."""
    return [_CHAOS.format(**json.loads(_CHAOS_NOTE.read_text()))] if _CHAOS_NOTE.exists() else []


def build_intro(reports: Sequence[Report], missing: Sequence[str]) -> str:
    """What was played when; what wasn't."""
    paths = [FOLDER / f"{report['name']}.json" for report in reports]
    days = {datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d") for path in paths}
    return _INTRO.format(
        cells=sum(len(report["cells"]) for report in reports),
        days=" and ".join(sorted(days)),
        cores=os.cpu_count(),
        missing=f" Not played yet: {'; '.join(missing)}." if missing else "",
    )


def build_story(report: Report) -> str:
    """All that kubectl said and what the failures said of themselves, by cell."""
    lines = ["<details>", f"<summary>{report['words']}</summary>", ""]
    for cell in report["cells"]:
        lines += [f"{cell['kind']}, hit at {cell['step']}:", "", "```", *map(show_line, cell["said"]), "```", ""]
        words = [f"- {f['cause']}: {quote(f.get('message', ''))}" for f in cell["failures"]]
        words += [f"- Stuck: {quote(stuck)}" for stuck in cell["stuck"]]
        lines += [*words, ""] if words else []
    return "\n".join([*lines, "</details>", ""])


def show_line(said: tuple[float, dict[str, Any]]) -> str:
    """As kubectl prints it."""
    at, columns = said
    return f"{at:7.1f} s  " + "  ".join(filter(None, columns.values()))


def quote(words: str) -> str:
    """On one line."""
    return " ".join(words.split())
