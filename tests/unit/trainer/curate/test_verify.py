"""Tests of verification with every kind of unusual and broken image and caption."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sailvl_trainer.contract import CurateConfig, SourceConfig
from sailvl_trainer.curate import verify as subject
from sailvl_trainer.curate.captions import MAX_CAPTION_LENGTH, clean_caption
from sailvl_trainer.curate.items import MAX_FILE_BYTES, Item, read_item
from sailvl_trainer.curate.sources import list_items, list_partitions
from sailvl_trainer.curate.verify import VerifiedItem, verify_item
from sailvl_trainer.data.image_memory import limit_image_memory
from sailvl_trainer.storage.data_files import DataRoots
from tests.support.builders.images import build_decompression_bomb, build_exif, draw_noise, encode_image

CONFIG = CurateConfig(sources=(), min_side=16, max_pixels=10_000, max_tiles=4)
TILE_SIZE = 28
EVERYWHERE = DataRoots.resolve("/")


JPEG = encode_image(draw_noise(), "JPEG", quality=90)
PNG = encode_image(draw_noise(), "PNG")
DEEP = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
CLEAR = Image.merge("RGBA", (*draw_noise().split(), Image.linear_gradient("L").resize((60, 40))))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\nshowpage\n"

READABLE_IMAGES = [
    pytest.param(JPEG, "jpg", (60, 40), id="JPEG"),
    pytest.param(encode_image(draw_noise().convert("CMYK"), "JPEG"), "jpg", (60, 40), id="CMYK"),
    pytest.param(encode_image(draw_noise().convert("L"), "JPEG"), "jpg", (60, 40), id="grey"),
    pytest.param(encode_image(DEEP, "PNG"), "png", (60, 40), id="16 bits"),
    pytest.param(encode_image(CLEAR, "PNG"), "png", (60, 40), id="transparent"),
    pytest.param(encode_image(draw_noise().quantize(8), "PNG"), "png", (60, 40), id="palette"),
    pytest.param(encode_image(draw_noise(), "JPEG", exif=build_exif(6)), "jpg", (40, 60), id="rotated by EXIF"),
    pytest.param(
        encode_image(draw_noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff"), "jpg", (60, 40), id="broken EXIF"
    ),
    pytest.param(
        encode_image(draw_noise(), "GIF", save_all=True, append_images=[draw_noise(seed=1)]),
        "gif",
        (60, 40),
        id="animated GIF",
    ),
    pytest.param(encode_image(draw_noise(), "WEBP"), "webp", (60, 40), id="WebP"),
    pytest.param(encode_image(draw_noise(), "BMP"), "bmp", (60, 40), id="BMP"),
    pytest.param(encode_image(draw_noise(), "TIFF"), "tiff", (60, 40), id="TIFF"),
    pytest.param(
        encode_image(draw_noise(), "MPO", save_all=True, append_images=[draw_noise(seed=1)]),
        "jpg",
        (60, 40),
        id="MPO with two frames",
    ),
    pytest.param(encode_image(draw_noise(40, 250), "PNG"), "png", (40, 250), id="maximum number of pixels"),
]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., VerifiedItem]:
    """Return a function that verifies bytes in a file named .jpg, whatever their format."""

    def write_and_verify(
        data: bytes, *, caption: str | None = "a caption", config: CurateConfig = CONFIG
    ) -> VerifiedItem:
        path = tmp_path / "image.jpg"
        path.write_bytes(data)
        return verify_item(
            Item(source="s", key="k", path=os.fsencode(path), caption=caption), config, TILE_SIZE, EVERYWHERE
        )

    return write_and_verify


@pytest.fixture
def restore_budgets() -> Iterator[None]:
    """Restore the size of the process's budgets after the test."""
    yield
    limit_image_memory(None)


@pytest.mark.parametrize(("data", "suffix", "size"), READABLE_IMAGES)
def test_unusual_image_is_verified(
    check: Callable[..., VerifiedItem], data: bytes, suffix: str, size: tuple[int, int]
) -> None:
    found = check(data)
    assert (found.outcome, found.detail, found.format) == ("ok", "", suffix)
    assert (found.width, found.height) == size
    assert len(found.pixels_sha256) == 64
    assert found.phash is not None
    assert found.tiles >= 1


BROKEN_PNG = PNG[:60] + bytes(40) + PNG[100:]
BROKEN_IMAGES = [
    pytest.param(JPEG[: len(JPEG) // 2], "invalid_image", id="truncated JPEG"),
    pytest.param(JPEG[:30], "invalid_image", id="JPEG header only"),
    pytest.param(BROKEN_PNG, "invalid_image", id="corrupt PNG"),
    pytest.param(PNG[:-200], "invalid_image", id="truncated PNG"),
    pytest.param(b"", "invalid_image", id="empty file"),
    pytest.param(b"<html>not found</html>", "invalid_image", id="web page named .jpg"),
    pytest.param(EPS, "invalid_image", id="PostScript"),
    pytest.param(encode_image(draw_noise(15, 60), "PNG"), "too_small", id="too small"),
    pytest.param(encode_image(draw_noise(101, 100), "PNG"), "too_large", id="too large"),
    pytest.param(build_decompression_bomb(), "too_large", id="decompression bomb"),
]


@pytest.mark.parametrize(("data", "outcome"), BROKEN_IMAGES)
def test_bad_image_is_dropped_with_a_reason(check: Callable[..., VerifiedItem], data: bytes, outcome: str) -> None:
    found = check(data)
    assert found.outcome == outcome
    assert found.detail
    assert "0x" not in found.detail
    assert found.pixels_sha256 == ""


def test_decompression_bomb_is_dropped_without_decoding(
    check: Callable[..., VerifiedItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(subject, "open_image", lambda data, **_: decoded.append(data))
    assert check(build_decompression_bomb()) == VerifiedItem(
        outcome="too_large", detail="50000 × 50000 pixels", text="a caption", width=50_000, height=50_000
    )
    assert decoded == []


def test_raised_pixel_limit_is_respected(check: Callable[..., VerifiedItem]) -> None:
    config = replace(CONFIG, max_pixels=10**9)
    assert check(encode_image(draw_noise(200, 100), "PNG"), config=config).outcome == "ok"
    assert check(build_decompression_bomb(), config=config).outcome == "too_large"


def test_file_above_the_byte_limit_is_dropped_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert (
        verify_item(
            Item(source="s", key="k", path=os.fsencode(path), caption="w"), CONFIG, TILE_SIZE, EVERYWHERE
        ).outcome
        == "too_large"
    )


@pytest.mark.usefixtures("restore_budgets")
def test_outcome_does_not_depend_on_the_memory_of_the_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    path.write_bytes(encode_image(draw_noise(1500, 1500), "BMP"))
    item = Item(source="s", key="a", path=os.fsencode(path), caption="a caption")
    found = []
    for mebibytes in (4096, 50):  # of which 6 MiB are for encoded images, and 19 MiB for decoded ones
        limit_image_memory(mebibytes << 20)
        found.append(verify_item(item, replace(CONFIG, max_pixels=10**7), TILE_SIZE, EVERYWHERE))
        assert len(read_item(item, EVERYWHERE).image) == path.stat().st_size > 6 << 20
    assert found[0].outcome == "ok"
    assert found[1] == found[0]


CAPTIONS = [
    pytest.param(None, "no_caption", "", id="none"),
    pytest.param(" \n\t ", "no_caption", "", id="blank"),
    pytest.param("...", "no_caption", "...", id="no letter or digit"),
    pytest.param("x" * (MAX_CAPTION_LENGTH + 1), "long_caption", "x" * (MAX_CAPTION_LENGTH + 1), id="too long"),
    pytest.param("x" * MAX_CAPTION_LENGTH, "ok", "x" * MAX_CAPTION_LENGTH, id="maximum length"),
    pytest.param("  a\x00 red\r\n\r\n  cat\u200a ", "ok", "a red\ncat", id="spaces and control characters"),
    pytest.param("Cafe\u0301", "ok", "Café", id="composed"),
    pytest.param("bad \ud800 half", "ok", "bad ? half", id="half a surrogate pair"),
    pytest.param("一只红猫", "ok", "一只红猫", id="Chinese"),
    pytest.param("how to use <image> in HTML", "ok", "how to use <image> in HTML", id="placeholder is ordinary text"),
]


@pytest.mark.parametrize(("caption", "outcome", "text"), CAPTIONS)
def test_caption_is_cleaned_and_classified(
    check: Callable[..., VerifiedItem], caption: str | None, outcome: str, text: str
) -> None:
    found = check(JPEG, caption=caption)
    assert (found.outcome, found.text) == (outcome, text)
    assert clean_caption(found.text) == found.text


def test_missing_file_is_counted_and_a_storage_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = Item(source="s", key="k", path=os.fsencode(tmp_path / "gone.jpg"), caption="a caption")
    assert verify_item(item, CONFIG, TILE_SIZE, EVERYWHERE).outcome == "missing"

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(subject, "open_item", fail)
    with pytest.raises(OSError, match="Input/output error"):
        verify_item(item, CONFIG, TILE_SIZE, EVERYWHERE)


def test_pixel_hash_is_equal_in_every_format(check: Callable[..., VerifiedItem]) -> None:
    assert check(PNG).pixels_sha256 == check(encode_image(draw_noise(), "BMP")).pixels_sha256
    assert check(PNG).pixels_sha256 != check(encode_image(draw_noise().resize((59, 40)), "PNG")).pixels_sha256


def test_pillow_has_all_decoders() -> None:
    assert all(features.check(name) for name in ("jpg", "zlib", "webp"))


def test_procedural_item_is_drawn() -> None:
    (partition,) = list_partitions((SourceConfig(path="", format="procedural", samples=3, level=2),), seed=5)
    items = list(list_items(partition, EVERYWHERE))
    assert [item.index for item in items] == [0, 1, 2]
    found = [verify_item(item, replace(CONFIG, max_pixels=10**6), TILE_SIZE, EVERYWHERE) for item in items]
    assert [f.outcome for f in found] == ["ok"] * 3
    assert all(f.text.endswith(".") for f in found)
    assert len({f.pixels_sha256 for f in found}) == 3
