"""The report's plots as PNG files in base64, by matplotlib; called by report.py."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sailvl_trainer.curate.statistics import Histogram, Statistics

STYLE = {
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
COLOUR = "#3b6ea8"
MAX_LABELS = 9


def draw_plots(statistics: Statistics) -> dict[str, str]:
    """Title to picture."""
    return {
        "Words a caption": _bars(_merge(statistics.caption_words), "words", _whole),
        "Longer side": _bars(statistics.longer_side, "pixels, at least", _whole),
        "Aspect ratio": _bars(statistics.aspect_ratio, "width / height", "{:.2g}".format),
        "Tiles a picture": _bars(statistics.tiles, "tiles, the thumbnail included", _whole),
    }


def _whole(edge: float) -> str:
    return f"{edge:.0f}"


def _merge(histogram: Histogram, most: int = 40) -> Histogram:
    """Bins of equal width, of whole numbers, at most so many."""
    if not histogram:
        return histogram
    low, high = int(histogram[0][0]), int(histogram[-1][0])
    width = -(-(high - low + 1) // most)
    bins = dict.fromkeys(range(low, high + 1, width), 0)
    for edge, number in histogram:
        bins[low + (int(edge) - low) // width * width] += number
    return tuple((float(edge), number) for edge, number in bins.items())


def _bars(histogram: Histogram, label: str, name: Callable[[float], str]) -> str:
    """Bars side by side, whatever their bins' widths."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(histogram))
        axes.bar(places, [number for _, number in histogram], width=0.86, color=COLOUR)
        shown = places[:: -(-len(histogram) // MAX_LABELS) or 1]
        axes.set_xticks(list(shown), [name(histogram[i][0]) for i in shown])
        axes.set_xlim(-0.8, max(5, len(histogram)) - 0.2)
        axes.tick_params(length=0)
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
