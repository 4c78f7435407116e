"""A plot of a whole run: its losses in Prometheus, its stages, and the faults that were injected."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from tests.support.live.prometheus import Prometheus

GREY, RED = "#667085", "#c0392b"
COLORS = {
    "curate": "#8d6e63",
    "alignment": "#1f77b4",
    "advance": "#17a2a2",
    "knowledge": "#2e9e5b",
    "instruction": "#c08a00",
    "preference": "#8e5bb5",
    "evaluate": "#59636e",
}


def draw_run(path: Path, prometheus: Prometheus, status: dict[str, Any], faults: list[tuple[float, str]]) -> None:
    """Write a PNG; `faults` are Unix times in seconds with a label each."""
    stages = [stage for stage in status["stages"] if stage.get("startTime")]
    start, end = parse_seconds(stages[0]["startTime"]), parse_seconds(stages[-1]["completionTime"])
    figure = Figure(figsize=(11, 5.6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2])
    draw_losses(above, prometheus, start, end, stages)
    draw_stages(below, stages, start)
    for number, (at, label) in enumerate(faults):
        for axes in (above, below):
            axes.axvline(at - start, color=RED, linewidth=1, linestyle=(0, (4, 3)))
        above.annotate(
            label, (at - start, 0.97 - 0.06 * (number % 2)), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", color=RED, fontsize=8, va="top",
        )  # fmt: skip
    below.set_xlim(0, end - start)
    below.xaxis.set_major_locator(MultipleLocator(60))
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f}"))
    below.set_xlabel("minutes since the start", color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_losses(axes: Axes, prometheus: Prometheus, start: float, end: float, stages: list[dict[str, Any]]) -> None:
    """Draw the training loss as a line, the validation losses at both ends of a stage as points."""
    for series in prometheus.query_range('max by (stage) (sailvl_loss{run="demo"})', start, end, step=1):
        times, losses = break_at_gaps([(float(at) - start, float(value)) for at, value in series["values"]])
        axes.plot(times, losses, color=COLORS[series["metric"]["stage"]], linewidth=1.3, alpha=0.85)
    for stage in stages:
        metrics, color = stage.get("metrics", {}), COLORS[stage["name"]]
        if "heldOutLoss" not in metrics:
            continue
        begun, done = parse_seconds(stage["startTime"]) - start, parse_seconds(stage["completionTime"]) - start
        before, after = float(metrics["heldOutLossBefore"]), float(metrics["heldOutLoss"])
        axes.plot([begun, done], [before, after], "o", color=color, markersize=6, markeredgecolor="white")
        shuffled = float(metrics["heldOutLossShuffled"])
        axes.plot([done], [shuffled], "x", color=color, markersize=6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss per token", color=GREY)
    axes.set_title(
        "line: training   ●: validation, before and after   ×: validation with shuffled images",
        loc="left", fontsize=9, color=GREY,
    )  # fmt: skip
    style_axes(axes)


def break_at_gaps(points: list[tuple[float, float]], longest: float = 10) -> tuple[list[float], list[float]]:
    """Return times and values, with a NaN where no sample was scraped for a while."""
    result = points[:1]
    for before, point in pairwise(points):
        if point[0] - before[0] > longest:
            result.append((before[0], float("nan")))
        result.append(point)
    return [at for at, _ in result], [value for _, value in result]


def draw_stages(axes: Axes, stages: list[dict[str, Any]], start: float) -> None:
    """Draw a bar per stage."""
    for row, stage in enumerate(stages):
        begun, done = parse_seconds(stage["startTime"]) - start, parse_seconds(stage["completionTime"]) - start
        axes.barh(row, done - begun, left=begun, color=COLORS[stage["name"]], height=0.7)
    axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages], fontsize=8)
    axes.invert_yaxis()
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """Remove the frame and draw a pale grid."""
    axes.grid(visible=True, axis="x", color="#e4e7ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)


def parse_seconds(time: str) -> float:
    """Return an RFC 3339 time in seconds since 1970."""
    return datetime.fromisoformat(time).timestamp()
