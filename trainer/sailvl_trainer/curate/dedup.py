"""Duplicates over all sources, found by DuckDB over the rows' Parquet files, out of core; called by decide.py.

Rule: in the items' order, a picture is dropped when an earlier one that is kept has the same pixels, or a perceptual
hash within the distance. So the kept ones are pairwise farther apart, every dropped one has a kept one that stands for
it, and a long chain of look-alikes doesn't pull in what its end no longer resembles (single linkage would).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import duckdb
import pyarrow as pa

BITS = 64
MAX_KEYS = 64
"""Keys a hash in the join, at most; each is a row."""


def mark_duplicates(db: duckdb.DuckDBPyConnection, *, exact: bool, distance: int) -> None:
    """Make table repeats(item, outcome, first) from view ok(item, pixels_sha256, phash).

    `distance`: bits of the perceptual hash, -1: none. `first`: the kept item that stands for it.
    """
    db.execute("CREATE TABLE repeats (item BIGINT, outcome VARCHAR, first BIGINT)")
    if exact:
        db.execute(
            "INSERT INTO repeats SELECT item, 'duplicate', first FROM "
            "(SELECT item, min(item) OVER (PARTITION BY pixels_sha256) AS first FROM ok) WHERE item > first"
        )
    if distance >= 0:
        _mark_near(db, distance)
    if exact and distance >= 0:  # a picture's first copy may itself be near another one
        db.execute(
            "UPDATE repeats AS r SET first = n.first FROM repeats AS n "
            "WHERE r.outcome = 'duplicate' AND n.outcome = 'near_duplicate' AND n.item = r.first"
        )


def _mark_near(db: duckdb.DuckDBPyConnection, distance: int) -> None:
    """Equal hashes stand as one, by their first item: else a popular hash would be joined with itself."""
    db.execute(
        "CREATE TABLE hashes AS SELECT phash, min(item) AS item FROM ok ANTI JOIN repeats USING (item) "
        "WHERE phash IS NOT NULL GROUP BY phash"
    )
    keepers = _choose_keepers(_pairs(db, distance))
    moved = pa.table({"item": pa.array(keepers.keys(), pa.int64()), "keeper": pa.array(keepers.values(), pa.int64())})
    db.register("moved", moved)
    db.execute(
        "INSERT INTO repeats SELECT ok.item, 'near_duplicate', coalesce(keeper, hashes.item) AS first FROM ok "
        "ANTI JOIN repeats USING (item) JOIN hashes USING (phash) LEFT JOIN moved ON moved.item = hashes.item "
        "WHERE ok.item > first"
    )
    db.unregister("moved")


def _choose_keepers(pairs: Iterator[tuple[int, int]]) -> dict[int, int]:
    """Dropped item to the first kept one near it, from pairs (later, earlier) in order: earlier ones are decided."""
    keepers: dict[int, int] = {}
    for later, earlier in pairs:
        if later not in keepers and earlier not in keepers:
            keepers[later] = earlier
    return keepers


def _pairs(db: duckdb.DuckDBPyConnection, distance: int) -> Iterator[tuple[int, int]]:
    """All pairs within the distance, in order. What agrees in no key can't be near: see choose_masks."""
    (number,) = db.execute("SELECT count(*) FROM hashes").fetchall()[0]
    masks = pa.table({"key": range(n := len(found := choose_masks(number, distance))), "mask": pa.array(found)})
    assert n, "at least one mask"
    db.register("masks", masks)
    db.execute("CREATE TABLE keyed AS SELECT item, phash, key, phash & mask AS part FROM hashes, masks")
    db.unregister("masks")
    db.execute(
        "SELECT DISTINCT y.item, x.item FROM keyed x JOIN keyed y USING (key, part) "
        f"WHERE x.item < y.item AND bit_count(xor(x.phash, y.phash)) <= {int(distance)} ORDER BY ALL"
    )
    while chunk := db.fetchmany(65_536):
        yield from chunk


def choose_masks(number: int, distance: int) -> list[int]:
    """Masks (signed) of which at least one hides every difference of two hashes within the distance.

    Cut into distance + m bands, two such hashes agree in at least m whole bands (pigeonhole), so every m bands make a
    key. A larger m gives longer keys, which fewer of `number` hashes share, and more of them.
    """
    best = [_signed(0)]
    for together in range(1, 5):
        bands = distance + together
        keys = list(combinations(range(bands), together))
        if bands > BITS or len(keys) > MAX_KEYS:
            break
        best = [_signed(sum(_band(b, bands) for b in key)) for key in keys]
        if 1 << (BITS * together // bands) >= number:
            break
    return best


def _band(band: int, bands: int) -> int:
    """The bits of one band."""
    first, end = BITS * band // bands, BITS * (band + 1) // bands
    return (1 << end) - (1 << first)


def _signed(mask: int) -> int:
    return mask - (1 << BITS) if mask >= 1 << (BITS - 1) else mask
