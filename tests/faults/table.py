"""The table of all faults played so far, of their reports in build/faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tests.faults.volumes import FOLDER

HEAD = (
    "Fault", "Stage", "Cause", "Rank, node, exit code", "Counted", "Attempts", "Recovered", "Progressed",
    "Repeated", "Doubled, missing", "Same result", "`kubectl get svr` said",
)  # fmt: skip
UNITS = {"curate": "images", "pretrain": "steps", "sft": "steps", "evaluate": "questions"}
Report = dict[str, Any]


def read_reports(order: Sequence[str]) -> list[Report]:
    paths = [FOLDER / f"{name}.json" for name in order]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def build_rows(report: Report, undisturbed: Report) -> list[list[str]]:
    """A line a cell."""
    return [
        [
            report["words"] if number == 0 else "",
            cell["kind"],
            name_cause(cell),
            name_culprit(cell),
            " ".join(f"{cause} {n}" for cause, n in cell["countedRestarts"].items()),
            str(cell["attempts"] - cell["attempt"] + 1),
            show_seconds(cell["again"]),
            show_seconds(cell["beyond"]),
            f"{cell['lost']} {UNITS[cell['kind']]}",
            f"{cell['doubled']}, {cell['missing']}",
            compare(report, undisturbed, cell["stage"]),
            " → ".join(reason for reason, _ in groupby(line["REASON"] for _, line in cell["said"])),
        ]
        for number, cell in enumerate(report["cells"])
    ]


def name_cause(cell: dict[str, Any]) -> str:
    causes = [failure["cause"] for failure in cell["failures"]]
    words = ", ".join(f"{cause} ×{n}" if (n := causes.count(cause)) > 1 else cause for cause in dict.fromkeys(causes))
    return words or ("in place" if cell["again"] is not None else "none")


def name_culprit(cell: dict[str, Any]) -> str:
    if not cell["failures"]:
        return ""
    first = cell["failures"][0]
    known = (first.get("rank"), first.get("node"), first.get("exitCode"))
    return ", ".join("–" if value is None else str(value) for value in known)


def compare(report: Report, undisturbed: Report, stage: str) -> str:
    """Whether the stage's result is the undisturbed run's, byte for byte."""
    own, other = (r["books"].get(stage, {}) for r in (report, undisturbed))
    if not own or not other:
        return ""
    skipped = f", {own['left_out']} skipped" if own["left_out"] else ""
    return ("yes" if own["weights"] == other["weights"] else "no") + skipped


def show_seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def build_ledger(reports: Sequence[Report]) -> str:
    """Where the time went, by run."""
    buckets = list(dict.fromkeys(bucket for report in reports for bucket in report["seconds"]))
    rows = [
        [
            report["words"],
            *(str(report["seconds"].get(bucket, 0)) for bucket in buckets),
            str(sum(report["seconds"].values())),
            f"{report['wall']:.1f}",
            f"{report['lost_steps']}, {sum(c['lost'] for c in report['cells'] if c['kind'] in ('pretrain', 'sft'))}",
        ]
        for report in reports
    ]
    return build_markdown(("Seconds by bucket", *buckets, "sum", "wall clock", "lost steps: reported, counted"), rows)


def build_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
