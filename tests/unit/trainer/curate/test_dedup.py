"""Duplicates found through keys in SQL are those that a look at all pairs finds."""

from __future__ import annotations

import random

import duckdb
import pyarrow as pa
import pytest

from sailvl_trainer.curate.dedup import choose_masks, mark_duplicates
from sailvl_trainer.curate.phash import distance as hamming

Row = tuple[int, str, int | None]


def brute_force(rows: list[Row], *, exact: bool, distance: int) -> list[tuple[int, str, int]]:
    """One after the other, against all that are kept."""
    kept: list[Row] = []
    stands_for: dict[int, int] = {}
    found = []
    for item, pixels, phash in rows:
        same = [r[0] for r in rows if r[0] < item and r[1] == pixels] if exact else []
        near = [k[0] for k in kept if phash is not None and k[2] is not None and hamming(phash, k[2]) <= distance]
        if same:
            found.append((item, "duplicate", stands_for.get(same[0], same[0])))
        elif near:
            stands_for[item] = near[0]
            found.append((item, "near_duplicate", near[0]))
        else:
            kept.append((item, pixels, phash))
    return found


def run(rows: list[Row], *, exact: bool = True, distance: int = 4) -> list[tuple[int, str, int]]:
    table = pa.table(
        {
            "item": pa.array([r[0] for r in rows], pa.int64()),
            "pixels_sha256": [r[1] for r in rows],
            "phash": pa.array([r[2] for r in rows], pa.int64()),
        }
    )
    with duckdb.connect() as db:
        db.register("ok", table)
        mark_duplicates(db, exact=exact, distance=distance)
        return db.execute("SELECT * FROM repeats ORDER BY item").fetchall()


def build_rows(seed: int, number: int, flips: int) -> list[Row]:
    """Clusters of hashes some flips apart, chains among them; equal pixels; pictures without a hash."""
    rng = random.Random(seed)
    centres = [rng.getrandbits(64) for _ in range(number // 6)]
    rows: list[Row] = []
    for item in range(number):
        value = rng.choice(centres)
        for bit in rng.sample(range(64), rng.randint(0, flips)):
            value ^= 1 << bit
        if rng.random() < 0.3:
            centres.append(value)
        phash = None if rng.random() < 0.05 else value - (1 << 64) if value >= 1 << 63 else value
        pixels = rng.choice(rows)[1:] if rows and rng.random() < 0.1 else (f"pixels {item}", phash)
        rows.append((item, *pixels))
    return rows


@pytest.mark.parametrize("distance", [-1, 0, 1, 4, 9, 40, 64])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_as_a_look_at_all_pairs(seed: int, exact: bool, distance: int) -> None:
    rows = build_rows(seed, 200, flips=max(2, min(distance + 2, 20)))
    found = run(rows, exact=exact, distance=distance)
    assert found == brute_force(rows, exact=exact, distance=distance)
    assert found or (distance < 0 and not exact)


def test_a_chain_is_not_pulled_in() -> None:
    """0 stands for 1; 2 is near 1 alone, which is dropped, so 2 stays."""
    rows: list[Row] = [(0, "a", 0), (1, "b", 0b111), (2, "c", 0b111111)]
    assert run(rows, distance=3) == [(1, "near_duplicate", 0)]


def test_order_of_the_rows_does_not_matter() -> None:
    rows = build_rows(7, 300, flips=5)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert run(shuffled) == run(rows)


@pytest.mark.parametrize("number", [1, 1000, 10**6, 10**8])
@pytest.mark.parametrize("distance", [0, 1, 4, 8, 31, 63, 64])
def test_some_mask_hides_all_differences(number: int, distance: int) -> None:
    masks = choose_masks(number, distance)
    rng = random.Random(number + distance)
    for _ in range(200):
        difference = sum(1 << bit for bit in rng.sample(range(64), distance))
        assert any((mask & difference) & (2**64 - 1) == 0 for mask in masks)


def test_keys_grow_with_the_data() -> None:
    """So that few hashes share one: at a hundred million, keys of 13 bits would pair each with ten thousand others."""
    bits = [min(bin(m & (2**64 - 1)).count("1") for m in choose_masks(n, 4)) for n in (1000, 10**6, 10**8)]
    assert bits == [12, 20, 27]
