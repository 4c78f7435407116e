"""Tests of the image hashes and of the search for duplicates, against a comparison of all pairs."""

from __future__ import annotations

import io
import random

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sailvl_trainer.curate.dedup import choose_masks, hash_perceptually, mark_duplicates
from tests.support.builders.images import draw_noise, encode_image

Row = tuple[int, str, int | None]
"""Item, pixel hash and perceptual hash."""


def count_different_bits(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


def compare_all_pairs(rows: list[Row], *, exact: bool, distance: int) -> list[tuple[int, str, int]]:
    """Return item, outcome and kept item of all duplicates, by comparing each item with all kept ones."""
    kept_rows: list[Row] = []
    kept_item_by_item: dict[int, int] = {}
    found = []
    for item, pixels, phash in rows:
        same = [r[0] for r in rows if r[0] < item and r[1] == pixels] if exact else []
        near = [
            k[0]
            for k in kept_rows
            if phash is not None and k[2] is not None and count_different_bits(phash, k[2]) <= distance
        ]
        if same:
            found.append((item, "duplicate", kept_item_by_item.get(same[0], same[0])))
        elif near:
            kept_item_by_item[item] = near[0]
            found.append((item, "near_duplicate", near[0]))
        else:
            kept_rows.append((item, pixels, phash))
    return found


def find_duplicates(rows: list[Row], *, exact: bool = True, distance: int = 4) -> list[tuple[int, str, int]]:
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
        return db.execute("SELECT * FROM duplicates ORDER BY item").fetchall()


def build_rows(seed: int, number: int, flips: int) -> list[Row]:
    """Build clusters and chains of hashes up to `flips` bits apart, equal pixels, and images without a hash."""
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
def test_duplicates_equal_those_of_comparing_all_pairs(seed: int, exact: bool, distance: int) -> None:
    rows = build_rows(seed, 200, flips=max(2, min(distance + 2, 20)))
    found = find_duplicates(rows, exact=exact, distance=distance)
    assert found == compare_all_pairs(rows, exact=exact, distance=distance)
    assert found or (distance < 0 and not exact)


def test_image_near_a_dropped_image_only_is_kept() -> None:
    rows: list[Row] = [(0, "a", 0), (1, "b", 0b111), (2, "c", 0b111111)]
    assert find_duplicates(rows, distance=3) == [(1, "near_duplicate", 0)]


def test_duplicates_do_not_depend_on_the_order_of_rows() -> None:
    rows = build_rows(7, 300, flips=5)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert find_duplicates(shuffled) == find_duplicates(rows)


@pytest.mark.parametrize("number", [1, 1000, 10**6, 10**8])
@pytest.mark.parametrize("distance", [0, 1, 4, 8, 31, 63, 64])
def test_some_mask_is_equal_for_hashes_within_the_distance(number: int, distance: int) -> None:
    masks = choose_masks(number, distance)
    rng = random.Random(number + distance)
    for _ in range(200):
        difference = sum(1 << bit for bit in rng.sample(range(64), distance))
        assert any((mask & difference) & (2**64 - 1) == 0 for mask in masks)


def test_masks_have_more_bits_for_more_hashes() -> None:
    """With 10**8 hashes, keys of 13 bits would pair each hash with ten thousand others."""
    bits = [min(bin(m & (2**64 - 1)).count("1") for m in choose_masks(n, 4)) for n in (1000, 10**6, 10**8)]
    assert bits == [12, 20, 27]


def test_perceptual_hash_is_stable_under_scaling_and_compression() -> None:
    image = draw_noise(200, 150)
    phash = hash_perceptually(image)
    compressed = Image.open(io.BytesIO(encode_image(image.resize((120, 90)), "JPEG", quality=60)))
    other = hash_perceptually(draw_noise(200, 150, seed=1))
    assert phash is not None
    assert other is not None
    assert count_different_bits(phash, hash_perceptually(compressed) or 0) <= 4
    assert count_different_bits(phash, other) > 16


def test_image_without_structure_has_no_perceptual_hash() -> None:
    assert hash_perceptually(Image.new("RGB", (50, 50), (9, 99, 9))) is None


def test_single_frequency_sets_a_single_bit_of_the_perceptual_hash() -> None:
    x = np.cos(np.pi * (2 * np.arange(32) + 1) * 3 / 64)
    wave = Image.fromarray(np.broadcast_to(128 + 100 * x, (32, 32)).astype(np.uint8))
    phash = hash_perceptually(wave)
    assert phash is not None
    bits = np.unpackbits(np.array([phash], dtype=">i8").view(np.uint8)).reshape(8, 8)
    assert bits[0, 3] == 1
    assert not bits[1:].any()
