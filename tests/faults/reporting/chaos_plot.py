"""A plot of the chaos test: the progress of each run over time, and every fault."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from tests.faults.injections.chaos import ChaosEvent
from tests.faults.reporting.plots import COLORS, MAIN
from tests.faults.runs.report import ExperimentReport
from tests.faults.runs.spec import KINDS
from tests.support.live.run_plot import GREY, RED, style_axes

MAX_LABEL_CHARACTERS = 34


def draw_chaos(path: Path, reports: Sequence[ExperimentReport], events: Sequence[ChaosEvent]) -> None:
    """Write a PNG: time on the x axis, stages and their progress on the y axis, a labelled line for each fault."""
    points = [point for report in reports for point in report.points]
    if not points:
        return
    start, end = points[0].at, points[-1].at
    figure = Figure(figsize=(max(10.0, (end - start) / 95), 7.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for report in reports:
        draw_progress(axes, report, start)
    for event in events:
        draw_event(axes, event, start)
    axes.set_yticks([index + 0.5 for index in range(len(KINDS))], list(KINDS))
    axes.set_ylim(0, len(KINDS) + 2.6)
    axes.xaxis.set_major_locator(MultipleLocator(120))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f}"))
    axes.set_xlabel(f"minutes; {len(reports)} runs, {len(events)} faults", color=GREY)
    style_axes(axes)
    figure.savefig(path)


def draw_progress(axes: Axes, report: ExperimentReport, start: float) -> None:
    """Draw a line per stage; it falls where a new attempt resumes from a checkpoint."""
    order = list(KINDS)
    for point, after in pairwise(report.points):
        if point.stage != after.stage or not point.steps or not after.steps:
            continue
        heights = [order.index(p.stage) + p.step / p.steps for p in (point, after)]
        axes.plot([point.at - start, after.at - start], heights, color=COLORS[MAIN[point.stage]], linewidth=2)
    axes.axvspan(report.points[0].at - start, report.points[-1].at - start, ymax=0.012, color=GREY, linewidth=0)


def draw_event(axes: Axes, event: ChaosEvent, start: float) -> None:
    """Draw a fault and the time for which it lasted."""
    at = event.at - start
    axes.axvline(at, ymax=len(KINDS) / (len(KINDS) + 2.6), color=RED, linewidth=0.6, linestyle=(0, (4, 3)))
    if event.until > event.at:
        axes.axvspan(at, event.until - start, ymax=len(KINDS) / (len(KINDS) + 2.6), color=RED, alpha=0.08, linewidth=0)
    label = f"{event.title}: {event.target}"[:MAX_LABEL_CHARACTERS]
    axes.text(at, len(KINDS) + 0.05, label, rotation=90, fontsize=6.5, color=GREY, ha="center", va="bottom")
