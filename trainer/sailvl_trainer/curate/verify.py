"""One raw item to one row: decoded or rejected with the reason, measured and hashed. Nothing in a file is fatal."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from sailvl_trainer.contract import CurateConfig
from sailvl_trainer.curate.ingest import Item
from sailvl_trainer.data.images import open_image, read_size

HASH_SIDE, HASH_BITS = 32, 8
MAX_CAPTION = 4000
"""Characters; a longer caption is no caption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What verification found; `outcome` is ok, or why the item is dropped."""

    item: int
    source: str
    key: str
    outcome: str
    caption: str = ""
    width: int = 0
    height: int = 0
    pixels_sha256: str = ""
    phash: int = 0
    """64 bits as a signed integer."""


def verify(number: int, item: Item, config: CurateConfig) -> Row:
    """Check one item; sizes come from the header, so that a decompression bomb is never decoded."""
    base: dict[str, Any] = {"item": number, "source": item.source, "key": item.key}
    caption = (item.caption or "").strip()
    if not caption or len(caption) > MAX_CAPTION:
        return Row(**base, outcome="no_caption" if not caption else "long_caption")
    base["caption"] = caption
    try:
        data = item.read()
        width, height = read_size(data)
        base |= {"width": width, "height": height}
        if width * height > config.max_pixels:
            return Row(**base, outcome="too_large")
        if min(width, height) < config.min_side:
            return Row(**base, outcome="too_small")
        image = open_image(data)
    except Exception:  # noqa: BLE001  # decoders raise anything on broken bytes; all of it means the same
        return Row(**base, outcome="unreadable")
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return Row(**base, outcome="ok", pixels_sha256=pixels, phash=perceptual_hash(image))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: signs of the low frequencies of the cosine transform against their median (pHash)."""
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR)
    gray_HW = np.asarray(small, dtype=np.float64)
    low = (_DCT @ gray_HW @ _DCT.T)[:HASH_BITS, :HASH_BITS].ravel()
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">i8")[0])


def as_columns(rows: list[Row]) -> dict[str, list[Any]]:
    """Rows as columns, for Parquet."""
    return {name: [asdict(row)[name] for row in rows] for name in Row.__dataclass_fields__}


def _cosine_matrix(n: int) -> np.ndarray:
    k, i = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    matrix: np.ndarray = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * np.sqrt(2 / n)
    return matrix


_DCT = _cosine_matrix(HASH_SIDE)
