"""Tests of the orientation of images, against Pillow's own reading of EXIF and XMP."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sailvl_trainer.data.image_headers import read_header
from sailvl_trainer.data.image_structure import InvalidImage
from sailvl_trainer.data.images import open_image
from tests.support.builders.images import draw_noise, encode_image
from tests.support.fuzz import mutate_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "MPO")
IMAGE = draw_noise(24, 16)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def build_exif_bytes(orientation: int, *, order: str = "<", start: int = 8, kind: int = 3, count: int = 1) -> bytes:
    """Build EXIF data whose directory is at `start`, with a text before the orientation."""
    text = struct.pack(order + "HHLL", 0x010F, 2, 9, start + 30)
    value = struct.pack(order + ("HH" if kind == 3 else "L"), *((orientation, 0) if kind == 3 else (orientation,)))
    directory = struct.pack(order + "H", 2) + text + struct.pack(order + "HHL", 0x0112, kind, count) + value
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, start)
    return b"Exif\0\0" + header.ljust(start, b"\0") + directory + bytes(4) + b"a camera\0".ljust(40, b"\0")


def encode_with_exif(form: str, exif: bytes) -> bytes:
    frames = {"save_all": True, "append_images": [IMAGE]} if form == "MPO" else {}
    return encode_image(IMAGE, form, exif=exif, **frames, **({"lossless": True} if form == "WEBP" else {}))


def build_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def insert_chunk(name: bytes, data: bytes, *, is_behind_pixels: bool) -> bytes:
    """Return a PNG with a chunk behind its header or behind its pixels."""
    png = encode_image(IMAGE, "PNG")
    position = len(png) - 12 if is_behind_pixels else 33
    return png[:position] + build_chunk(name, data) + png[position:]


def assert_upright(data: bytes, *, is_rotated: bool) -> None:
    """Assert that size and pixels are those that Pillow's transpose gives."""
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    header = read_header(data)
    assert (header.width, header.height) == expected.size == ((16, 24) if is_rotated else (24, 16))
    with open_image(data) as upright:
        assert np.array_equal(np.asarray(upright), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", FORMATS)
def test_image_with_exif_is_upright(form: str, orientation: int) -> None:
    for order in "<>":
        for start in (8, 46):
            for kind in (3, 4):
                exif = build_exif_bytes(orientation, order=order, start=start, kind=kind)
                assert_upright(encode_with_exif(form, exif), is_rotated=orientation >= 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_is_upright(orientation: int, compression: str | None) -> None:
    data = encode_image(IMAGE, "TIFF", compression=compression, tiffinfo={274: orientation})
    assert_upright(data, is_rotated=orientation >= 5)


BROKEN = [
    pytest.param(b"Exif\0\0", id="empty"),
    pytest.param(b"Exif\0\0MM\0*\xff\xff", id="truncated header"),
    pytest.param(b"Exif\0\0XX" + build_exif_bytes(6)[8:], id="no byte order"),
    pytest.param(build_exif_bytes(6)[:20], id="truncated directory"),
    pytest.param(build_exif_bytes(6, start=8)[:10] + b"\xff\xff\xff\x7f", id="directory outside of the data"),
    pytest.param(build_exif_bytes(0), id="orientation 0"),
    pytest.param(build_exif_bytes(9), id="orientation 9"),
    pytest.param(build_exif_bytes(6, kind=2), id="orientation as text"),
    pytest.param(build_exif_bytes(6, count=0), id="no value"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exif", BROKEN)
@pytest.mark.parametrize("form", FORMATS)
def test_image_with_broken_exif_is_taken_as_it_is(form: str, exif: bytes) -> None:
    header = read_header(encode_with_exif(form, exif))
    assert (header.width, header.height, header.orientation) == (24, 16, 1)


@pytest.mark.parametrize("is_behind_pixels", [False, True], ids=["before the pixels", "behind the pixels"])
def test_png_is_upright_by_chunks_of_any_place(is_behind_pixels: bool) -> None:
    exif = build_exif_bytes(6)
    digits = exif.hex()
    raw = f"\nexif\n{len(exif):8}\n{digits[:72]}\n{digits[72:]}\n".encode()
    chunks = {
        "EXIF": (b"eXIf", exif[6:]),
        "ImageMagick's text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    }
    for name, data in chunks.values():
        assert_upright(insert_chunk(name, data, is_behind_pixels=is_behind_pixels), is_rotated=True)


def test_orientation_of_xmp_counts_if_exif_has_none() -> None:
    without = build_exif_bytes(6).replace(struct.pack("<H", 0x0112), struct.pack("<H", 0x0110))
    for exif, is_rotated in ((b"", True), (without, True), (build_exif_bytes(1), False)):
        for form in ("JPEG", "WEBP"):
            data = encode_image(IMAGE, form, xmp=XMP, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
            assert_upright(data, is_rotated=is_rotated)


def read_with_pillow(data: bytes) -> int:
    """Return the orientation as Pillow reads it; 1 if it can't."""
    with Image.open(io.BytesIO(data)) as image:
        try:
            orientation = image.getexif().get(0x0112, 1)
        except Exception:  # noqa: BLE001  # as broken as it can be
            return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def test_mutated_exif_has_the_orientation_that_pillow_reads() -> None:
    generator, orientations = random.Random(0), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(600):
            exif = build_exif_bytes(number % 8 + 1, order="<>"[number // 8 % 2], kind=(3, 4)[number // 16 % 2])
            data = encode_with_exif(FORMATS[number % 3], b"Exif\0\0" + mutate_bytes(exif[6:66], generator))
            try:
                found = read_header(data).orientation
            except InvalidImage:
                continue
            orientations.add(found)
            assert found == read_with_pillow(data), exif
    assert orientations == set(range(1, 9))
