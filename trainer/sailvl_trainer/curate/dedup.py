"""Duplicate images: the hashes by which images are compared, and the search for duplicates over all sources.

verify.py computes the hashes of every image in parallel; selection.py calls the search once, as SQL in DuckDB, which
works out of core.

Rule: in the order of items, an image is dropped if an earlier image that is kept has the same pixels, or a perceptual
hash within the distance. So all kept images differ by more than the distance, every dropped image has a kept one that
represents it, and a long chain of similar images doesn't drop images that no longer resemble its start (single linkage
would).

Array suffixes: H, W: height and width in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image

PHASH_BITS = 64
PHASH_SIDE, PHASH_FREQUENCIES = 32, 8
HASHED_PIXELS = 1 << 18
"""Pixels that are hashed at once, so that an image isn't copied as a whole."""
MIN_CONTRAST = 1.0
"""Standard deviation in grey levels. Below it the frequencies of an image are only rounding noise."""
MAX_JOIN_KEYS = 64
"""Maximum number of keys per hash in the join for near duplicates; each key is a row."""


def hash_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of size and pixels, which is equal for one image in different formats, keys or folders."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    rows = max(1, HASHED_PIXELS // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(image.height, top + rows))).tobytes())
    return digest.hexdigest()


def hash_perceptually(image: Image.Image) -> int | None:
    """Return the 64-bit perceptual hash (pHash), or None for an image without structure.

    The image is reduced to 32 x 32 grey pixels and transformed by a DCT-II; each bit says whether one of the 8 x 8
    lowest frequencies exceeds their median. The result is a signed integer, which both Parquet and SQL can hold.
    """
    small = image.convert("L").resize((PHASH_SIDE, PHASH_SIDE), Image.Resampling.BILINEAR)
    grey_HW = np.asarray(small, dtype=np.float64)
    if grey_HW.std() < MIN_CONTRAST:
        return None
    frequencies = (_DCT @ grey_HW @ _DCT.T)[:PHASH_FREQUENCIES, :PHASH_FREQUENCIES].ravel()
    # Rounded, so that a frequency that is zero by symmetry doesn't depend on the platform's last bit.
    frequencies = np.round(frequencies, 6)
    return int(np.packbits(frequencies > np.median(frequencies[1:])).view(">i8")[0])


def mark_duplicates(db: duckdb.DuckDBPyConnection, *, exact: bool, distance: int) -> None:
    """Create table duplicates(item, outcome, duplicate_of) from view ok(item, pixels_sha256, phash).

    `exact`: whether to mark images with equal pixels. `distance`: maximum number of different bits of the perceptual
    hashes of near duplicates; -1: mark no near duplicates. Column `duplicate_of` is the kept item.
    """
    db.execute("CREATE TABLE duplicates (item BIGINT, outcome VARCHAR, duplicate_of BIGINT)")
    if exact:
        db.execute(
            "INSERT INTO duplicates SELECT item, 'duplicate', first FROM "
            "(SELECT item, min(item) OVER (PARTITION BY pixels_sha256) AS first FROM ok) WHERE item > first"
        )
    if distance >= 0:
        _mark_near_duplicates(db, distance)
    if exact and distance >= 0:  # the first image with equal pixels may be a near duplicate of another image
        db.execute(
            "UPDATE duplicates AS d SET duplicate_of = n.duplicate_of FROM duplicates AS n "
            "WHERE d.outcome = 'duplicate' AND n.outcome = 'near_duplicate' AND n.item = d.duplicate_of"
        )


def _mark_near_duplicates(db: duckdb.DuckDBPyConnection, distance: int) -> None:
    """Join each distinct hash, represented by its first item, so that a frequent hash isn't joined with itself."""
    db.execute(
        "CREATE TABLE hashes AS SELECT phash, min(item) AS item FROM ok ANTI JOIN duplicates USING (item) "
        "WHERE phash IS NOT NULL GROUP BY phash"
    )
    kept_items = _find_kept_items(_find_near_pairs(db, distance))
    dropped = pa.table(
        {"item": pa.array(kept_items.keys(), pa.int64()), "kept_item": pa.array(kept_items.values(), pa.int64())}
    )
    db.register("dropped", dropped)
    db.execute(
        "INSERT INTO duplicates SELECT ok.item, 'near_duplicate', coalesce(kept_item, hashes.item) AS duplicate_of "
        "FROM ok ANTI JOIN duplicates USING (item) JOIN hashes USING (phash) "
        "LEFT JOIN dropped ON dropped.item = hashes.item WHERE ok.item > duplicate_of"
    )
    db.unregister("dropped")


def _find_kept_items(pairs: Iterator[tuple[int, int]]) -> dict[int, int]:
    """Return the kept item for each dropped one, from pairs (later, earlier) in ascending order.

    In this order it is already decided whether the earlier item of a pair is dropped.
    """
    kept_items: dict[int, int] = {}
    for later, earlier in pairs:
        if later not in kept_items and earlier not in kept_items:
            kept_items[later] = earlier
    return kept_items


def _find_near_pairs(db: duckdb.DuckDBPyConnection, distance: int) -> Iterator[tuple[int, int]]:
    """Yield all pairs (later, earlier) within the distance in ascending order.

    Only hashes that share a key are compared; see choose_masks for why no pair is missed.
    """
    (number,) = db.execute("SELECT count(*) FROM hashes").fetchall()[0]
    masks = choose_masks(number, distance)
    db.register("masks", pa.table({"key": range(len(masks)), "mask": pa.array(masks)}))
    db.execute("CREATE TABLE keyed AS SELECT item, phash, key, phash & mask AS masked FROM hashes, masks")
    db.unregister("masks")
    db.execute(
        "SELECT DISTINCT y.item, x.item FROM keyed x JOIN keyed y USING (key, masked) "
        f"WHERE x.item < y.item AND bit_count(xor(x.phash, y.phash)) <= {int(distance)} ORDER BY ALL"
    )
    while chunk := db.fetchmany(65_536):
        yield from chunk


def choose_masks(number: int, distance: int) -> list[int]:
    """Return bit masks, as signed integers, at least one of which is equal for any two hashes within the distance.

    If a hash is divided into distance + m bands, two such hashes have at least m equal bands (pigeonhole principle), so
    that each combination of m bands makes a mask. A larger m gives more masks with more bits, which fewer of the
    `number` hashes share.
    """
    masks = [_to_signed(0)]
    for bands_per_key in range(1, 5):
        bands = distance + bands_per_key
        keys = list(combinations(range(bands), bands_per_key))
        if bands > PHASH_BITS or len(keys) > MAX_JOIN_KEYS:
            break
        masks = [_to_signed(sum(_build_band(band, bands) for band in key)) for key in keys]
        if 1 << (PHASH_BITS * bands_per_key // bands) >= number:
            break
    return masks


def _build_band(band: int, bands: int) -> int:
    """Return the mask of one of `bands` bands."""
    first, end = PHASH_BITS * band // bands, PHASH_BITS * (band + 1) // bands
    return (1 << end) - (1 << first)


def _to_signed(mask: int) -> int:
    return mask - (1 << PHASH_BITS) if mask >= 1 << (PHASH_BITS - 1) else mask


def _build_dct_matrix(n: int) -> np.ndarray:
    """Return the n x n matrix of the orthonormal DCT-II."""
    k, i = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    matrix: np.ndarray = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _build_dct_matrix(PHASH_SIDE)
