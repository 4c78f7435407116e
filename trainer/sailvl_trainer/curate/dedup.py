"""Duplicates over all sources, found by DuckDB over the rows' Parquet files, out of core."""

from __future__ import annotations

from pathlib import Path

import duckdb


def find_duplicates(rows: Path, *, exact: bool, distance: int) -> dict[int, tuple[str, int]]:
    """Item number to (outcome, the earlier item that it repeats).

    `rows`: folder of Parquet files of verify.Row; `distance`: bits of the perceptual hash, -1: none.
    """
    found: dict[int, tuple[str, int]] = {}
    with duckdb.connect() as db:
        db.read_parquet(f"{rows}/*.parquet").filter("outcome = 'ok'").create_view("ok")
        if exact:
            found |= {item: ("duplicate", first) for item, first in _exact(db)}
        if distance >= 0:
            found |= {i: ("near_duplicate", first) for i, first in _perceptual(db, distance) if i not in found}
    return found


def _exact(db: duckdb.DuckDBPyConnection) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = db.execute(
        "SELECT item, first FROM (SELECT item, min(item) OVER (PARTITION BY pixels_sha256) AS first FROM ok) "
        "WHERE item > first ORDER BY item"
    ).fetchall()
    return found


def _perceptual(db: duckdb.DuckDBPyConnection, distance: int) -> list[tuple[int, int]]:
    """Pairs within the distance. Of distance + 1 bands at least one is equal, so equal bands give all candidates."""
    bands = distance + 1
    width = -(-64 // bands)
    found: list[tuple[int, int]] = db.execute(
        f"""
        WITH bands AS (
          SELECT item, phash, b AS band, (phash >> (b * {width})) & {(1 << min(width, 63)) - 1} AS part
          FROM ok, range({bands}) t(b))
        SELECT y.item, min(x.item) FROM bands x JOIN bands y
          ON x.band = y.band AND x.part = y.part AND x.item < y.item
        WHERE bit_count(xor(x.phash, y.phash)) <= {distance}
        GROUP BY y.item ORDER BY y.item"""  # numbers of our own
    ).fetchall()
    return found
