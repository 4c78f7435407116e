"""The report's pictures: some kept ones of every source, some dropped ones of every reason; called by report.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb

from sailvl_trainer.curate.artifacts import to_items
from sailvl_trainer.curate.items import Item, read_item
from sailvl_trainer.curate.statistics import DUPLICATES, KEPT
from sailvl_trainer.reporting.thumbnails import draw_thumbnail

KEPT_PICTURES = 24
DROPPED_PICTURES = 4
"""A reason."""
DECODED = (*KEPT, *DUPLICATES, "too_small", "no_caption", "long_caption")
"""Outcomes of pictures that are worth a try: bombs and broken files are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One picture of the report; data in base64, empty where there is nothing to show."""

    name: str
    caption: str
    detail: str
    data: str
    beside: str = ""
    """Of a duplicate: the kept picture that stands for it."""


def choose_kept(db: duckdb.DuckDBPyConnection) -> list[Tile]:
    """Sources take turns; within one the order is that of the pixels' hashes: as good as random, and repeatable."""
    query = (
        "SELECT * EXCLUDE (turn) FROM "
        "(SELECT *, row_number() OVER (PARTITION BY source ORDER BY pixels_sha256, item) AS turn "
        f"FROM decided WHERE outcome IN $1) ORDER BY turn, item LIMIT {KEPT_PICTURES}"
    )
    return [_tile(row, item) for row, item in _fetch(db, query, [list(KEPT)])]


def choose_dropped(db: duckdb.DuckDBPyConnection) -> dict[str, list[Tile]]:
    """Reason to the first few of it."""
    reasons = db.execute(
        "SELECT outcome FROM decided WHERE outcome NOT IN $1 GROUP BY 1 ORDER BY count(*) DESC, 1", [list(KEPT)]
    ).fetchall()
    query = f"SELECT * FROM decided WHERE outcome = $1 ORDER BY item LIMIT {DROPPED_PICTURES}"
    return {
        reason: [_tile(row, item, _beside(db, row)) for row, item in _fetch(db, query, [reason])]
        for (reason,) in reasons
    }


def _fetch(db: duckdb.DuckDBPyConnection, query: str, values: list[Any]) -> list[tuple[dict[str, Any], Item]]:
    table = db.sql(query, params=values).to_arrow_table()
    return list(zip(table.to_pylist(), to_items(table), strict=True))


def _beside(db: duckdb.DuckDBPyConnection, row: dict[str, Any]) -> str:
    if row["first"] is None:
        return ""
    ((_, item),) = _fetch(db, "SELECT * FROM decided WHERE item = $1", [row["first"]])
    return _draw(item)


def _tile(row: dict[str, Any], item: Item, beside: str = "") -> Tile:
    data = _draw(item) if row["outcome"] in DECODED else ""
    return Tile(
        name=f"{item.source}/{item.key}", caption=row["text"][:160], detail=row["detail"], data=data, beside=beside
    )


def _draw(item: Item) -> str:
    """Empty for what can't be shown."""
    try:
        return draw_thumbnail(read_item(item).data)
    except Exception:  # noqa: BLE001  # containers raise anything, and the file may be gone since
        return ""
