"""Every kind of bad and odd picture, made for real: read right, or counted by its outcome, and never fatal."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from sailvl_trainer.contract import CurateConfig, SourceConfig
from sailvl_trainer.curate import verify as subject
from sailvl_trainer.curate.captions import MAX_CAPTION, clean_caption
from sailvl_trainer.curate.ingest import list_containers, list_items
from sailvl_trainer.curate.items import Item
from sailvl_trainer.curate.phash import distance, perceptual_hash
from sailvl_trainer.curate.verify import Verified, verify

CONFIG = CurateConfig(sources=(), min_side=16, max_pixels=10_000, max_tiles=4)
TILE = 28


def noise(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth picture with structure."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def bomb() -> bytes:
    """A PNG whose header promises 50,000 x 50,000 pixels; the rest of it is a few bytes."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(100_000))) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


JPEG = encode(noise(), "JPEG", quality=90)
PNG = encode(noise(), "PNG")
DEEP = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
CLEAR = Image.merge("RGBA", (*noise().split(), Image.linear_gradient("L").resize((60, 40))))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\nshowpage\n"

READ = [
    pytest.param(JPEG, "jpg", (60, 40), id="JPEG"),
    pytest.param(encode(noise().convert("CMYK"), "JPEG"), "jpg", (60, 40), id="CMYK"),
    pytest.param(encode(noise().convert("L"), "JPEG"), "jpg", (60, 40), id="grey"),
    pytest.param(encode(DEEP, "PNG"), "png", (60, 40), id="16 bits"),
    pytest.param(encode(CLEAR, "PNG"), "png", (60, 40), id="transparent"),
    pytest.param(encode(noise().quantize(8), "PNG"), "png", (60, 40), id="palette"),
    pytest.param(encode(noise(), "JPEG", exif=exif(6)), "jpg", (40, 60), id="turned by EXIF"),
    pytest.param(encode(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff"), "jpg", (60, 40), id="broken EXIF"),
    pytest.param(
        encode(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]), "gif", (60, 40), id="animated GIF"
    ),
    pytest.param(encode(noise(), "WEBP"), "webp", (60, 40), id="WebP"),
    pytest.param(encode(noise(), "BMP"), "bmp", (60, 40), id="BMP"),
    pytest.param(encode(noise(), "TIFF"), "tiff", (60, 40), id="TIFF"),
    pytest.param(
        encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)]), "jpg", (60, 40), id="two pictures in one"
    ),
    pytest.param(encode(noise(40, 250), "PNG"), "png", (40, 250), id="as large as may be"),
]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Verified]:
    """Verify bytes under the name of a JPEG, whatever they are."""

    def run(data: bytes, *, caption: str | None = "words", config: CurateConfig = CONFIG) -> Verified:
        path = tmp_path / "picture.jpg"
        path.write_bytes(data)
        return verify(Item(source="s", key="k", path=os.fsencode(path), caption=caption), config, TILE)

    return run


@pytest.mark.parametrize(("data", "suffix", "size"), READ)
def test_odd_pictures_are_read_right(
    check: Callable[..., Verified], data: bytes, suffix: str, size: tuple[int, int]
) -> None:
    found = check(data)
    assert (found.outcome, found.detail, found.format) == ("ok", "", suffix)
    assert (found.width, found.height) == size
    assert len(found.pixels_sha256) == 64
    assert found.phash is not None
    assert found.tiles >= 1


BROKEN_PNG = PNG[:60] + bytes(40) + PNG[100:]
DROPPED = [
    pytest.param(JPEG[: len(JPEG) // 2], "unreadable", id="truncated JPEG"),
    pytest.param(JPEG[:30], "unreadable", id="JPEG's head alone"),
    pytest.param(BROKEN_PNG, "unreadable", id="corrupt PNG"),
    pytest.param(PNG[:-200], "unreadable", id="truncated PNG"),
    pytest.param(b"", "unreadable", id="no bytes"),
    pytest.param(b"<html>not found</html>", "unreadable", id="a web page called .jpg"),
    pytest.param(EPS, "unreadable", id="PostScript, which would start a program"),
    pytest.param(encode(noise(15, 60), "PNG"), "too_small", id="too small"),
    pytest.param(encode(noise(101, 100), "PNG"), "too_large", id="too large"),
    pytest.param(bomb(), "too_large", id="decompression bomb"),
]


@pytest.mark.parametrize(("data", "outcome"), DROPPED)
def test_bad_pictures_are_counted(check: Callable[..., Verified], data: bytes, outcome: str) -> None:
    found = check(data)
    assert found.outcome == outcome
    assert found.detail
    assert "0x" not in found.detail
    assert found.pixels_sha256 == ""


def test_a_bomb_is_refused_by_its_header(check: Callable[..., Verified], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(subject, "open_image", lambda data, **_: decoded.append(data))
    assert check(bomb()) == Verified(
        outcome="too_large", detail="50000 × 50000 pixels", text="words", width=50_000, height=50_000
    )
    assert decoded == []


def test_a_raised_limit_is_followed(check: Callable[..., Verified]) -> None:
    config = replace(CONFIG, max_pixels=10**9)
    assert check(encode(noise(200, 100), "PNG"), config=config).outcome == "ok"
    assert check(bomb(), config=config).outcome == "too_large"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(subject.MAX_BYTES + 1)
    assert verify(Item(source="s", key="k", path=os.fsencode(path), caption="w"), CONFIG, TILE).outcome == "too_large"


CAPTIONS = [
    pytest.param(None, "no_caption", "", id="none"),
    pytest.param(" \n\t ", "no_caption", "", id="blank"),
    pytest.param("...", "no_caption", "...", id="no letter"),
    pytest.param("x" * (MAX_CAPTION + 1), "long_caption", "x" * (MAX_CAPTION + 1), id="too long"),
    pytest.param("x" * MAX_CAPTION, "ok", "x" * MAX_CAPTION, id="as long as may be"),
    pytest.param("  a\x00 red\r\n\r\n  cat\u200a ", "ok", "a red\ncat", id="spaces and control characters"),
    pytest.param("Cafe\u0301", "ok", "Café", id="composed"),
    pytest.param("bad \ud800 half", "ok", "bad ? half", id="half a surrogate pair"),
    pytest.param("一只红猫", "ok", "一只红猫", id="Chinese"),
    pytest.param("how to use <image> in HTML", "ok", "how to use <image> in HTML", id="a mark is a word"),
]


@pytest.mark.parametrize(("caption", "outcome", "text"), CAPTIONS)
def test_captions(check: Callable[..., Verified], caption: str | None, outcome: str, text: str) -> None:
    found = check(JPEG, caption=caption)
    assert (found.outcome, found.text) == (outcome, text)
    assert clean_caption(found.text) == found.text


def test_a_file_that_went_is_counted_and_a_failing_storage_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = Item(source="s", key="k", path=os.fsencode(tmp_path / "gone.jpg"), caption="words")
    assert verify(item, CONFIG, TILE).outcome == "missing"

    def fail(_: Item) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(subject, "_stored_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        verify(item, CONFIG, TILE)


def test_equal_pixels_have_one_hash_in_every_format(check: Callable[..., Verified]) -> None:
    assert check(PNG).pixels_sha256 == check(encode(noise(), "BMP")).pixels_sha256
    assert check(PNG).pixels_sha256 != check(encode(noise().resize((59, 40)), "PNG")).pixels_sha256


def test_the_perceptual_hash_outlives_what_the_eye_does_not_see() -> None:
    picture = noise(200, 150)
    base = perceptual_hash(picture)
    again = Image.open(io.BytesIO(encode(picture.resize((120, 90)), "JPEG", quality=60)))
    other = perceptual_hash(noise(200, 150, seed=1))
    assert base is not None
    assert other is not None
    assert distance(base, perceptual_hash(again) or 0) <= 4
    assert distance(base, other) > 16
    assert perceptual_hash(Image.new("RGB", (50, 50), (9, 99, 9))) is None


def test_the_hash_is_a_cosine_transform() -> None:
    """One wave along x is one frequency: alone above the median."""
    x = np.cos(np.pi * (2 * np.arange(32) + 1) * 3 / 64)
    wave = Image.fromarray(np.broadcast_to(128 + 100 * x, (32, 32)).astype(np.uint8))
    found = perceptual_hash(wave)
    assert found is not None
    bits = np.unpackbits(np.array([found], dtype=">i8").view(np.uint8)).reshape(8, 8)
    assert bits[0, 3] == 1
    assert not bits[1:].any()


def test_pillow_has_the_decoders() -> None:
    assert all(features.check(name) for name in ("jpg", "zlib", "webp"))


def test_a_procedural_item_is_drawn() -> None:
    (container,) = list_containers((SourceConfig(path="", format="procedural", samples=3, level=2),), seed=5)
    items = list(list_items(container))
    assert [item.index for item in items] == [0, 1, 2]
    found = [verify(item, replace(CONFIG, max_pixels=10**6), TILE) for item in items]
    assert [f.outcome for f in found] == ["ok"] * 3
    assert all(f.text.endswith(".") for f in found)
    assert len({f.pixels_sha256 for f in found}) == 3
