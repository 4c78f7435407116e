"""The report of a curate stage: report.json for programs, index.html with plots and images for people.

Called by stage.py on the first rank.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate import gallery
from sailvl_trainer.curate.artifacts import CurationArtifacts
from sailvl_trainer.curate.statistics import (
    KEPT_OUTCOMES,
    REPORT_JSON,
    Histogram,
    Statistics,
    compute_statistics,
    open_decided,
)
from sailvl_trainer.reporting.page import render_page
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode

OUTCOME_LABELS = {
    "kept": "kept for training",
    "held_out": "held out for validation",
    "duplicate": "identical pixels",
    "near_duplicate": "near duplicate",
    "no_caption": "no caption",
    "long_caption": "caption too long",
    "too_small": "image too small",
    "too_large": "image too large to decode safely",
    "unreadable": "image unreadable",
    "missing": "file missing",
    "bad_record": "invalid line in a caption file",
    "broken_tar": "tar truncated or damaged",
}
PLOT_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9c2cc",
    "axes.labelcolor": "#51606f",
    "xtick.color": "#51606f",
    "ytick.color": "#51606f",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8ecf0",
    "axes.axisbelow": True,
}
BAR_COLOUR = "#3b6ea8"
MAX_TICK_LABELS = 9


def write_report(artifacts: CurationArtifacts, folder: Path, config: CurateConfig) -> None:
    """Write both files from the artifacts of a finished stage; report.json last, as it marks the report complete."""
    statistics = compute_statistics(artifacts)
    with open_decided(artifacts) as db:
        kept_cards, dropped_cards = gallery.choose_kept(db), gallery.choose_dropped(db)
    page = render_page(
        "curate/report.html.jinja",
        statistics=statistics,
        config=config,
        labels=OUTCOME_LABELS,
        kept_outcomes=KEPT_OUTCOMES,
        plots=draw_plots(statistics),
        kept_cards=kept_cards,
        dropped_cards=dropped_cards,
    )
    write_atomic(folder / "index.html", page)
    write_atomic(folder / REPORT_JSON, encode(statistics))


def draw_plots(statistics: Statistics) -> dict[str, str]:
    """Return the plots by title, as PNG files in base64."""
    return {
        "Words per caption": _draw_bars(_rebin(statistics.word_count), "words", _format_integer),
        "Longer side": _draw_bars(statistics.longer_side, "pixels (lower edge)", _format_integer),
        "Aspect ratio": _draw_bars(statistics.aspect_ratio, "width / height", "{:.2g}".format),
        "Tiles per image": _draw_bars(statistics.tiles, "tiles, including the thumbnail", _format_integer),
    }


def _format_integer(edge: float) -> str:
    return f"{edge:.0f}"


def _rebin(histogram: Histogram, max_bins: int = 40) -> Histogram:
    """Return a histogram of integers with at most `max_bins` bins of equal width."""
    if not histogram:
        return histogram
    low, high = int(histogram[0][0]), int(histogram[-1][0])
    width = -(-(high - low + 1) // max_bins)
    bins = dict.fromkeys(range(low, high + 1, width), 0)
    for edge, count in histogram:
        bins[low + (int(edge) - low) // width * width] += count
    return tuple((float(edge), count) for edge, count in bins.items())


def _draw_bars(histogram: Histogram, label: str, format_edge: Callable[[float], str]) -> str:
    """Draw bars of equal width, whatever the widths of the bins."""
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        positions = range(len(histogram))
        axes.bar(positions, [count for _, count in histogram], width=0.86, color=BAR_COLOUR)
        ticks = positions[:: -(-len(histogram) // MAX_TICK_LABELS) or 1]
        axes.set_xticks(list(ticks), [format_edge(histogram[i][0]) for i in ticks])
        axes.set_xlim(-0.8, max(5, len(histogram)) - 0.2)
        axes.tick_params(length=0)
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
