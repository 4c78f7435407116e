"""A plot of all runs with faults: a bar per run, coloured by activity, with the faults as marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from tests.faults.reporting.table import ReportDocument
from tests.support.live.run_plot import GREY, RED, parse_seconds, style_axes

COLORS = {
    "starting": "#cfd4dc",
    "curating": "#8d6e63",
    "pretraining": "#1f77b4",
    "fine-tuning": "#2e9e5b",
    "evaluating": "#8e5bb5",
    "checkpoint": "#17a2a2",
    "restarting": "#f0b429",
    "lost work": "#f1948a",
    "waiting for a user": "#1d2939",
}
MAIN = {"curate": "curating", "align": "pretraining", "tune": "fine-tuning", "score": "evaluating"}
Document = dict[str, Any]


def draw_time_bars(path: Path, reports: Sequence[ReportDocument]) -> None:
    """Write a PNG with a bar per report."""
    figure = Figure(figsize=(12, 1.2 + 0.36 * len(reports)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, report in enumerate(reports):
        draw_bar(axes, row, report)
    axes.set_yticks(range(len(reports)), [report["title"] for report in reports], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MultipleLocator(60))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f}"))
    axes.set_xlabel("minutes since the run's start", color=GREY)
    style_axes(axes)
    keys = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=8, frameon=False)
    figure.savefig(path)


def draw_bar(axes: Axes, row: int, report: ReportDocument) -> None:
    """Draw one run with a mark for every fault."""
    if not report["points"]:
        return
    start = parse_seconds(report["status"]["startTime"])
    for begun, ended, bucket in merge_neighbours(divide_time(report)):
        axes.barh(row, ended - begun, left=begun - start, color=COLORS[bucket], height=0.62)
    for effect in report["effects"]:
        axes.plot([effect["injected_at"] - start], [row - 0.4], marker="v", color=RED, markersize=6)


def divide_time(report: Document) -> Iterator[tuple[float, float, str]]:
    """Yield start, end (Unix time in seconds) and activity of each segment of a run."""
    points, end = report["points"], report["status"].get("completionTime")
    last = points[-1] | {"at": parse_seconds(end) if end else points[-1]["at"]}
    for point, after in pairwise([*points, last]):
        yield point["at"], after["at"], classify_time(point, report["effects"])


def classify_time(point: Document, effects: Sequence[Document]) -> str:
    """Return the activity from a point on."""
    for effect in effects:
        if effect["stage"] == point["stage"] and (found := classify_by_fault(point, effect)):
            return found
    if point["state"] in ("Starting", "Succeeded", "Restarting") or point["phase"] in ("", "starting"):
        return "starting"
    if point["phase"] == "checkpointing":
        return "checkpoint"
    return "evaluating" if point["phase"] == "evaluating" else MAIN[point["stage"]]


def classify_by_fault(point: Document, effect: Document) -> str:
    """Return the activity that a fault caused from a point on, or an empty string if it had no effect on it."""
    if point["state"] == "Failed":
        return "waiting for a user"
    restart_seconds, injected_at = effect["next_step_seconds"], effect["injected_at"]
    if restart_seconds is not None and injected_at <= point["at"] < injected_at + restart_seconds:
        return "restarting"
    is_before = point["attempt"] == effect["attempt"] and point["at"] < injected_at
    is_training = effect["kind"] in ("pretrain", "sft")
    is_lost = is_before and is_training and point["step"] > effect["step"] - effect["repeated_work"]
    return "lost work" if is_lost else ""


def merge_neighbours(segments: Iterator[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Join consecutive segments of the same activity."""
    current: tuple[float, float, str] | None = None
    for segment in segments:
        if current is not None and current[2] == segment[2]:
            current = (current[0], segment[1], current[2])
            continue
        if current is not None:
            yield current
        current = segment
    if current is not None:
        yield current
