"""A picture of all runs with faults: a bar a run, coloured by what its time went to, with the faults on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from tests.support.live.run_plot import GREY, RED, quiet, seconds

COLORS = {
    "starting": "#cfd4dc",
    "curating": "#8d6e63",
    "pretraining": "#1f77b4",
    "fine-tuning": "#2e9e5b",
    "evaluating": "#8e5bb5",
    "checkpoint": "#17a2a2",
    "restarting": "#f0b429",
    "lost": "#f1948a",
    "waiting for people": "#1d2939",
}
MAIN = {"curate": "curating", "align": "pretraining", "tune": "fine-tuning", "score": "evaluating"}
Run = dict[str, Any]


def draw_table(path: Path, reports: Sequence[Run]) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(12, 1.2 + 0.36 * len(reports)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, report in enumerate(reports):
        draw_bar(axes, row, report)
    axes.set_yticks(range(len(reports)), [report["words"] for report in reports], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MultipleLocator(60))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f}"))
    axes.set_xlabel("minutes since the run's start", color=GREY)
    quiet(axes)
    keys = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=8, frameon=False)
    figure.savefig(path)


def draw_bar(axes: Axes, row: int, report: Run) -> None:
    """One run, a mark for every fault."""
    if not report["points"]:
        return
    start = seconds(report["status"]["startTime"])
    for begun, ended, bucket in merge(divide(report)):
        axes.barh(row, ended - begun, left=begun - start, color=COLORS[bucket], height=0.62)
    for cell in report["cells"]:
        axes.plot([cell["struck"] - start], [row - 0.4], marker="v", color=RED, markersize=6)


def divide(report: Run) -> Iterator[tuple[float, float, str]]:
    """From, to (Unix seconds) and what the time was for."""
    points, end = report["points"], report["status"].get("completionTime")
    last = points[-1] | {"at": seconds(end) if end else points[-1]["at"]}
    for point, after in pairwise([*points, last]):
        yield point["at"], after["at"], name_bucket(point, report["cells"])


def name_bucket(point: Run, cells: Sequence[Run]) -> str:
    """What the time from a point on was for."""
    for cell in cells:
        if cell["stage"] == point["stage"] and (found := name_by_fault(point, cell)):
            return found
    if point["state"] in ("Starting", "Succeeded", "Restarting") or point["phase"] in ("", "starting"):
        return "starting"
    if point["phase"] == "checkpointing":
        return "checkpoint"
    return "evaluating" if point["phase"] == "evaluating" else MAIN[point["stage"]]


def name_by_fault(point: Run, cell: Run) -> str:
    """What a fault made of the time; empty: it had no part in it."""
    if point["state"] == "Failed":
        return "waiting for people"
    over = cell["again"] or cell["beyond"]
    if cell["again"] is not None and cell["struck"] <= point["at"] < cell["struck"] + over:
        return "restarting"
    is_before = point["attempt"] == cell["attempt"] and point["at"] < cell["struck"]
    is_training = cell["kind"] in ("pretrain", "sft")
    return "lost" if is_before and is_training and point["step"] > cell["step"] - cell["lost"] else ""


def merge(segments: Iterator[tuple[float, float, str]]) -> Iterator[tuple[float, float, str]]:
    """Neighbours of a kind as one."""
    whole: tuple[float, float, str] | None = None
    for segment in segments:
        if whole is not None and whole[2] == segment[2]:
            whole = (whole[0], segment[1], whole[2])
            continue
        if whole is not None:
            yield whole
        whole = segment
    if whole is not None:
        yield whole
