"""The tables of all faults and of the goodput ledger, from the reports in build/faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tests.faults.environment.volumes import FOLDER

HEAD = (
    "Fault", "Stage", "Cause", "Rank, node, exit code", "Counted", "Attempts", "Recovered", "Progressed",
    "Repeated", "Duplicate, missing", "Same result", "`kubectl get svr` printed",
)  # fmt: skip
UNITS = {"curate": "images", "pretrain": "steps", "sft": "steps", "evaluate": "questions"}
ReportDocument = dict[str, Any]
"""An ExperimentReport as it is stored."""


def read_reports(order: Sequence[str]) -> list[ReportDocument]:
    """Return the stored reports among some names, in their order."""
    paths = [FOLDER / f"{name}.json" for name in order]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def build_rows(report: ReportDocument, undisturbed: ReportDocument) -> list[list[str]]:
    """Return a row per stage of a report."""
    return [
        [
            report["title"] if number == 0 else "",
            effect["kind"],
            describe_causes(effect),
            describe_origin(effect),
            " ".join(f"{cause} {n}" for cause, n in effect["counted_restarts"].items()),
            str(effect["attempts"] - effect["attempt"] + 1),
            format_seconds(effect["next_step_seconds"]),
            format_seconds(effect["new_step_seconds"]),
            f"{effect['repeated_work']} {UNITS[effect['kind']]}",
            f"{effect['duplicates']}, {effect['missing']}",
            compare_results(report, undisturbed, effect["stage"]),
            " → ".join(reason for reason, _ in groupby(line["REASON"] for _, line in effect["printed_rows"])),
        ]
        for number, effect in enumerate(report["effects"])
    ]


def describe_causes(effect: dict[str, Any]) -> str:
    """Return the causes of the failures with their numbers; without a failure, how the stage restarted."""
    causes = [failure["cause"] for failure in effect["failures"]]
    text = ", ".join(f"{cause} ×{n}" if (n := causes.count(cause)) > 1 else cause for cause in dict.fromkeys(causes))
    return text or ("in place" if effect["next_step_seconds"] is not None else "none")


def describe_origin(effect: dict[str, Any]) -> str:
    """Return rank, node and exit code of the first failure."""
    if not effect["failures"]:
        return ""
    first = effect["failures"][0]
    known = (first.get("rank"), first.get("node"), first.get("exitCode"))
    return ", ".join("–" if value is None else str(value) for value in known)


def compare_results(report: ReportDocument, undisturbed: ReportDocument, stage: str) -> str:
    """Return whether the stage's result equals the undisturbed run's, byte for byte."""
    own, other = (r["audits"].get(stage, {}) for r in (report, undisturbed))
    if not own or not other:
        return ""
    skipped = f", {own['skipped']} skipped" if own["skipped"] else ""
    return ("yes" if own["digest"] == other["digest"] else "no") + skipped


def format_seconds(value: float | None) -> str:
    """Return a time with its unit, or an empty effect for None."""
    return "" if value is None else f"{value:.1f} s"


def build_goodput_table(reports: Sequence[ReportDocument]) -> str:
    """Return the goodput ledger and the lost steps, a row per run."""
    buckets = list(dict.fromkeys(bucket for report in reports for bucket in report["goodput_seconds"]))
    rows = [
        [
            report["title"],
            *(str(report["goodput_seconds"].get(bucket, 0)) for bucket in buckets),
            str(sum(report["goodput_seconds"].values())),
            f"{report['wall_clock_seconds']:.1f}",
            f"{report['lost_steps']}, {count_repeated_steps(report)}",
        ]
        for report in reports
    ]
    return build_markdown(("Seconds by bucket", *buckets, "sum", "wall clock", "lost steps: reported, counted"), rows)


def count_repeated_steps(report: ReportDocument) -> int:
    """Return the repeated optimizer steps of a report's training stages, by their logs."""
    return sum(e["repeated_work"] for e in report["effects"] if e["kind"] in ("pretrain", "sft"))


def build_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(effect.replace("|", "\\|") for effect in line) + " |\n" for line in lines)
