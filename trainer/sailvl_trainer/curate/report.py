"""The report of a curate stage: report.json for programs, index.html with plots and images for people.

The images are samples of the kept ones and of every reason for dropping. Called by stage.py on the first rank.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.artifacts import CurationArtifacts, parse_items
from sailvl_trainer.curate.items import Item, read_item
from sailvl_trainer.curate.statistics import (
    DUPLICATE_OUTCOMES,
    KEPT_OUTCOMES,
    REPORT_JSON,
    Histogram,
    Statistics,
    compute_statistics,
    open_decided,
)
from sailvl_trainer.reporting import encode_thumbnail, render_page
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.files import write_atomic

OUTCOME_LABELS = {
    "kept": "kept for training",
    "held_out": "held out for validation",
    "duplicate": "identical pixels",
    "near_duplicate": "near duplicate",
    "no_caption": "no caption",
    "long_caption": "caption too long",
    "too_small": "image too small",
    "too_large": "image too large to decode safely",
    "invalid_image": "image cannot be decoded",
    "missing": "file missing",
    "irregular_file": "not a regular file",
    "outside_source": "link to a file outside of the source",
    "invalid_record": "invalid record",
    "invalid_tar": "tar truncated or damaged",
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
MAX_KEPT_IMAGES = 24
MAX_DROPPED_IMAGES = 4
"""Maximum number of images per reason."""
DISPLAYABLE_OUTCOMES = (*KEPT_OUTCOMES, *DUPLICATE_OUTCOMES, "too_small", "no_caption", "long_caption")
"""Outcomes of images that may be decoded; broken files and decompression bombs may not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryCard:
    """One image of the report."""

    name: str
    caption: str
    detail: str
    thumbnail: str
    """JPEG in base64; empty if the image can't be displayed."""
    kept_thumbnail: str = ""
    """Thumbnail of the kept image that a duplicate was dropped for."""


def write_report(artifacts: CurationArtifacts, folder: Path, config: CurateConfig, roots: DataRoots) -> None:
    """Write both files from the artifacts of a finished stage; report.json last, as it marks the report complete."""
    statistics = compute_statistics(artifacts)
    with open_decided(artifacts) as db:
        kept_cards, dropped_cards = choose_kept_cards(db, roots), choose_dropped_cards(db, roots)
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


def choose_kept_cards(db: duckdb.DuckDBPyConnection, roots: DataRoots) -> list[GalleryCard]:
    """Choose kept images from all sources in turn, in the order of pixel hashes: random, but repeatable."""
    query = (
        "SELECT * EXCLUDE (turn) FROM "
        "(SELECT *, row_number() OVER (PARTITION BY source ORDER BY pixels_sha256, item) AS turn "
        f"FROM decided WHERE outcome IN $1) ORDER BY turn, item LIMIT {MAX_KEPT_IMAGES}"
    )
    return [_build_card(row, item, roots) for row, item in _fetch_items(db, query, [list(KEPT_OUTCOMES)])]


def choose_dropped_cards(db: duckdb.DuckDBPyConnection, roots: DataRoots) -> dict[str, list[GalleryCard]]:
    """Choose the first dropped images of every reason; reasons are in descending order of their counts."""
    reasons = db.execute(
        "SELECT outcome FROM decided WHERE outcome NOT IN $1 GROUP BY 1 ORDER BY count(*) DESC, 1",
        [list(KEPT_OUTCOMES)],
    ).fetchall()
    query = f"SELECT * FROM decided WHERE outcome = $1 ORDER BY item LIMIT {MAX_DROPPED_IMAGES}"
    return {
        reason: [
            _build_card(row, item, roots, _encode_kept_thumbnail(db, row, roots))
            for row, item in _fetch_items(db, query, [reason])
        ]
        for (reason,) in reasons
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


def _fetch_items(db: duckdb.DuckDBPyConnection, query: str, values: list[Any]) -> list[tuple[dict[str, Any], Item]]:
    table = db.sql(query, params=values).to_arrow_table()
    return list(zip(table.to_pylist(), parse_items(table), strict=True))


def _encode_kept_thumbnail(db: duckdb.DuckDBPyConnection, row: dict[str, Any], roots: DataRoots) -> str:
    """Return the thumbnail of the item that a duplicate was dropped for; empty for other rows."""
    if row["duplicate_of"] is None:
        return ""
    ((_, item),) = _fetch_items(db, "SELECT * FROM decided WHERE item = $1", [row["duplicate_of"]])
    return _encode_item_thumbnail(item, roots)


def _build_card(row: dict[str, Any], item: Item, roots: DataRoots, kept_thumbnail: str = "") -> GalleryCard:
    return GalleryCard(
        name=f"{item.source}/{item.key}",
        caption=row["text"][:160],
        detail=row["detail"],
        thumbnail=_encode_item_thumbnail(item, roots) if row["outcome"] in DISPLAYABLE_OUTCOMES else "",
        kept_thumbnail=kept_thumbnail,
    )


def _encode_item_thumbnail(item: Item, roots: DataRoots) -> str:
    """Return a JPEG in base64, or an empty string if the item can't be read any more."""
    try:
        return encode_thumbnail(read_item(item, roots).image)
    except Exception:  # noqa: BLE001  # decoders raise many types of errors, and the file may be gone by now
        return ""
