"""Tests of images that are built to take memory or time without limit, or to reach a decoder that isn't offered."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sailvl_trainer.data.image_headers import read_header
from sailvl_trainer.data.image_structure import ImageTooLarge, InvalidImage
from sailvl_trainer.data.images import open_image, read_size
from sailvl_trainer.data.tiles import cut_tiles
from sailvl_trainer.reporting import encode_thumbnail
from tests.support.builders.images import build_exif, draw_noise, encode_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"


def build_tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """Build a TIFF of one directory; each tag has number, type, count and value or offset."""
    common = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)}
    entries = common | {tag: values for tag, *values in tags}
    packed = b"".join(struct.pack("<HHLL", tag, *values) for tag, values in sorted(entries.items()))
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + packed + bytes(4 + 256)


def build_png_with_text(chunks: int) -> bytes:
    """Build a PNG with compressed texts of 1,000,000 characters each."""
    png = encode_image(draw_noise(), "PNG")
    text = b"key\0\0" + zlib.compress(bytes(1_000_000))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return png[:33] + chunk * chunks + png[33:]


def build_jpeg_with_scans(scans: int) -> bytes:
    """Build a progressive JPEG whose last scan is repeated."""
    data = encode_image(draw_noise(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


LOSSY_TILES = build_tiff((259, 3, 1, 5), (322, 4, 1, 1 << 16), (323, 4, 1, 1 << 16), (324, 4, 1, 200), (325, 4, 1, 64))
STRIPS = build_tiff((259, 3, 1, 1), (273, 4, 100_000_000, 200), (278, 4, 1, 1), (279, 4, 1, 64))
UNREADABLE = [
    pytest.param(EPS, "invalid image: not one of JPEG", id="PostScript"),
    pytest.param(encode_image(draw_noise(), "PPM"), "invalid image: not one of JPEG", id="format that isn't offered"),
    pytest.param(STRIPS, "tag 273 has 100000000 values", id="TIFF with 100 million strips"),
    pytest.param(STRIPS[:40], "invalid image", id="truncated TIFF"),
    pytest.param(b"II*\0\xff\xff\xff\xff", "invalid image", id="TIFF whose directory is outside of the file"),
    pytest.param(b"II+\0\x08\0\0\0" + bytes([255] * 8), "invalid image", id="BigTIFF without an end"),
    pytest.param(build_png_with_text(9), "Too much memory used in text chunks", id="PNG with large texts"),
    pytest.param(build_jpeg_with_scans(101), "more than 100 scans", id="JPEG with many scans"),
]


@pytest.mark.parametrize(("data", "message"), UNREADABLE)
def test_untrusted_image_is_refused_by_every_reader(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        open_image(data).__enter__()
    if "text chunks" not in message:  # which are read with the pixels
        with pytest.raises(InvalidImage, match=message):
            read_size(data)
    assert encode_thumbnail(data) == ""


def test_tile_that_is_much_larger_than_its_image_is_too_large() -> None:
    assert len(LOSSY_TILES) < 500
    with pytest.raises(ImageTooLarge, match=r"64 x 64 pixels need 32.0 GiB to decode"):
        open_image(LOSSY_TILES).__enter__()


def test_jpeg_with_the_scans_of_an_encoder_is_decoded() -> None:
    for data in (build_jpeg_with_scans(1), encode_image(draw_noise(), "JPEG")):
        with open_image(data) as image:
            assert image.mode == "RGB"


def test_bytes_behind_a_jpeg_and_in_its_thumbnail_are_no_scans() -> None:
    data = encode_image(draw_noise(), "JPEG", exif=build_exif(1))
    comment = b"\xff\xda\0\2" * 1000
    segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
    with open_image(data[:2] + segment + data[2:] + b"\xff\xda" * 1000) as image:
        assert image.size == (60, 40)


def test_many_frames_take_no_more_time_than_one() -> None:
    frames = [Image.new("L", (64, 64), number % 256) for number in range(400)]
    for form in ("GIF", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
        started = time.perf_counter()
        with open_image(buffer.getvalue()) as image:
            assert image.getpixel((0, 0)) == (0, 0, 0)
        assert time.perf_counter() - started < 0.5


def test_high_and_narrow_image_is_cut_in_little_memory() -> None:
    image = Image.new("RGB", (30, 400_000), (255, 255, 255))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_peak_bytes()
    pixels_N3HW = cut_tiles(image, (1, 12), 448)
    assert read_peak_bytes() - before < 300 << 20  # 717 MB if it were resized horizontally first
    assert float(pixels_N3HW.min()) == pytest.approx((1 - 0.485) / 0.229, rel=1e-3)


def read_peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


MODES = [
    pytest.param(np.uint16, 257.0, id="16 bits"),
    pytest.param(np.int32, 1000.0, id="32 bits"),
    pytest.param(np.float32, 1 / 255, id="floats"),
]


@pytest.mark.parametrize(("kind", "factor"), MODES)
def test_grey_values_are_scaled_in_strips_as_in_one_piece(kind: type, factor: float) -> None:
    values_HW = (np.random.default_rng(0).integers(0, 256, (700, 900)) * factor).astype(kind)
    white = {np.uint16: 65535.0, np.int32: float(values_HW.max()), np.float32: 1.0}[kind]
    expected_HW = np.clip(values_HW.astype(np.float64) * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    with open_image(encode_image(Image.fromarray(values_HW), "TIFF")) as image:
        assert np.array_equal(np.asarray(image)[..., 1], expected_HW)


def test_rotated_tiff_is_upright_as_other_formats() -> None:
    image = Image.new("RGB", (30, 20))
    image.paste((255, 0, 0), (0, 0, 15, 20))
    for form in ("TIFF", "PNG"):
        data = encode_image(image, form, exif=build_exif(6))
        header = read_header(data)
        assert (header.width, header.height) == (20, 30)
        with open_image(data) as upright:
            assert upright.size == (20, 30)
            assert [upright.getpixel((5, 5)), upright.getpixel((5, 25))] == [(255, 0, 0), (0, 0, 0)]
