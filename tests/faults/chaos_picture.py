"""A picture of the chaos: how far each run had come at each moment, and every strike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from tests.faults.chaos import Blow
from tests.faults.picture import COLORS, MAIN
from tests.faults.play import Report
from tests.faults.recipe import KINDS
from tests.support.live.run_plot import GREY, RED, quiet

LABEL_CHARACTERS = 34


def draw_chaos(path: Path, reports: Sequence[Report], blows: Sequence[Blow]) -> None:
    """Write a PNG: time to the right, progress through the stages upwards; a strike is a line with its name."""
    points = [point for report in reports for point in report.points]
    if not points:
        return
    start, end = points[0].at, points[-1].at
    figure = Figure(figsize=(max(10.0, (end - start) / 95), 7.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for report in reports:
        draw_progress(axes, report, start)
    for blow in blows:
        draw_blow(axes, blow, start)
    axes.set_yticks([index + 0.5 for index in range(len(KINDS))], list(KINDS))
    axes.set_ylim(0, len(KINDS) + 2.6)
    axes.xaxis.set_major_locator(MultipleLocator(120))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 60:.0f}"))
    axes.set_xlabel(f"minutes; {len(reports)} runs, {len(blows)} strikes", color=GREY)
    quiet(axes)
    figure.savefig(path)


def draw_progress(axes: Axes, report: Report, start: float) -> None:
    """A line by stage; where a new attempt begins from a checkpoint it falls back."""
    order = list(KINDS)
    for point, after in pairwise(report.points):
        if point.stage != after.stage or not point.steps or not after.steps:
            continue
        heights = [order.index(p.stage) + p.step / p.steps for p in (point, after)]
        axes.plot([point.at - start, after.at - start], heights, color=COLORS[MAIN[point.stage]], linewidth=2)
    axes.axvspan(report.points[0].at - start, report.points[-1].at - start, ymax=0.012, color=GREY, linewidth=0)


def draw_blow(axes: Axes, blow: Blow, start: float) -> None:
    """With the time for which it lasted."""
    at = blow.at - start
    axes.axvline(at, ymax=len(KINDS) / (len(KINDS) + 2.6), color=RED, linewidth=0.6, linestyle=(0, (4, 3)))
    if blow.until > blow.at:
        axes.axvspan(at, blow.until - start, ymax=len(KINDS) / (len(KINDS) + 2.6), color=RED, alpha=0.08, linewidth=0)
    words = f"{blow.words}: {blow.what}"[:LABEL_CHARACTERS]
    axes.text(at, len(KINDS) + 0.05, words, rotation=90, fontsize=6.5, color=GREY, ha="center", va="bottom")
