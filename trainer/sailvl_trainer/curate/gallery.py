"""The images of the curation report: samples of the kept ones and of every reason for dropping. Called by report.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb

from sailvl_trainer.curate.artifacts import parse_items
from sailvl_trainer.curate.items import Item, read_item
from sailvl_trainer.curate.statistics import DUPLICATE_OUTCOMES, KEPT_OUTCOMES
from sailvl_trainer.reporting.page import encode_thumbnail

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


def choose_kept(db: duckdb.DuckDBPyConnection) -> list[GalleryCard]:
    """Choose kept images from all sources in turn, in the order of pixel hashes: random, but repeatable."""
    query = (
        "SELECT * EXCLUDE (turn) FROM "
        "(SELECT *, row_number() OVER (PARTITION BY source ORDER BY pixels_sha256, item) AS turn "
        f"FROM decided WHERE outcome IN $1) ORDER BY turn, item LIMIT {MAX_KEPT_IMAGES}"
    )
    return [_build_card(row, item) for row, item in _fetch_items(db, query, [list(KEPT_OUTCOMES)])]


def choose_dropped(db: duckdb.DuckDBPyConnection) -> dict[str, list[GalleryCard]]:
    """Choose the first dropped images of every reason; reasons are in descending order of their counts."""
    reasons = db.execute(
        "SELECT outcome FROM decided WHERE outcome NOT IN $1 GROUP BY 1 ORDER BY count(*) DESC, 1",
        [list(KEPT_OUTCOMES)],
    ).fetchall()
    query = f"SELECT * FROM decided WHERE outcome = $1 ORDER BY item LIMIT {MAX_DROPPED_IMAGES}"
    return {
        reason: [
            _build_card(row, item, _encode_kept_thumbnail(db, row)) for row, item in _fetch_items(db, query, [reason])
        ]
        for (reason,) in reasons
    }


def _fetch_items(db: duckdb.DuckDBPyConnection, query: str, values: list[Any]) -> list[tuple[dict[str, Any], Item]]:
    table = db.sql(query, params=values).to_arrow_table()
    return list(zip(table.to_pylist(), parse_items(table), strict=True))


def _encode_kept_thumbnail(db: duckdb.DuckDBPyConnection, row: dict[str, Any]) -> str:
    """Return the thumbnail of the item that a duplicate was dropped for; empty for other rows."""
    if row["duplicate_of"] is None:
        return ""
    ((_, item),) = _fetch_items(db, "SELECT * FROM decided WHERE item = $1", [row["duplicate_of"]])
    return _encode_thumbnail(item)


def _build_card(row: dict[str, Any], item: Item, kept_thumbnail: str = "") -> GalleryCard:
    return GalleryCard(
        name=f"{item.source}/{item.key}",
        caption=row["text"][:160],
        detail=row["detail"],
        thumbnail=_encode_thumbnail(item) if row["outcome"] in DISPLAYABLE_OUTCOMES else "",
        kept_thumbnail=kept_thumbnail,
    )


def _encode_thumbnail(item: Item) -> str:
    """Return a JPEG in base64, or an empty string if the item can't be read any more."""
    try:
        return encode_thumbnail(read_item(item).image)
    except Exception:  # noqa: BLE001  # decoders raise many types of errors, and the file may be gone by now
        return ""
