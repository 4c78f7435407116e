"""Tests of images whose metadata is built to take memory or time without limit while their header is read."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sailvl_trainer.data import image_headers, image_tags
from sailvl_trainer.data.image_headers import check_structure, read_header
from sailvl_trainer.data.image_memory import IMAGE_MEMORY
from sailvl_trainer.data.image_structure import (
    MAX_EXIF_BYTES,
    MAX_JUNK_BYTES,
    MAX_SEGMENTS,
    InvalidImage,
)
from sailvl_trainer.data.images import read_size
from tests.support.builders.images import draw_noise, encode_image

RATIONAL, LONG, BYTE = 5, 4, 1
JPEG, PNG, GIF = (encode_image(draw_noise(), form) for form in ("JPEG", "PNG", "GIF"))
DATA_OFFSET = 4096


def measure_header(data: bytes) -> int:
    """Return the peak of the memory of Python's objects while a header is read."""
    tracemalloc.start()
    try:
        read_header(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def build_exif_with_rationals(count: int) -> bytes:
    """Build EXIF data whose orientation consists of rational numbers."""
    tag = struct.pack("<HHLL", 0x0112, RATIONAL, count, 26)
    return b"II*\0" + struct.pack("<LH", 8, 1) + tag + bytes(4) + struct.pack("<LL", 70_000, 3) * count


def build_segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def build_jpeg(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def build_jpeg_with_exif(exif: bytes) -> bytes:
    parts = (exif[start : start + 65_000] for start in range(0, len(exif), 65_000))
    return build_jpeg(*(build_segment(0xE1, b"Exif\0\0" + part) for part in parts))


def build_png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return PNG[:33] + b"".join(packed) + PNG[33:]


def build_tiff(*tags: tuple[int, int, int], below: tuple[tuple[int, int, int], ...] = (), size: int = 1 << 20) -> bytes:
    """Build a TIFF of 8 x 8 pixels; further tags have number, type and count, those `below` are in its EXIF."""
    common = {256: (4, 1, 8), 257: (4, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 2000)}
    entries = common | {279: (4, 1, 64)} | {tag: (kind, count, DATA_OFFSET) for tag, kind, count in tags}
    if below:
        entries[34665] = (4, 1, 1000)
    data = bytearray(size)
    data[:8] = b"II*\0" + struct.pack("<L", 8)
    for start, directory in ((8, entries), (1000, {tag: (*values, DATA_OFFSET) for tag, *values in below})):
        packed = b"".join(struct.pack("<HHLL", tag, *values) for tag, values in sorted(directory.items()))
        data[start : start + 2 + len(packed)] = struct.pack("<H", len(directory)) + packed
    return bytes(data)


EXIF = build_exif_with_rationals(20_000)
METADATA = [
    pytest.param(build_png((b"eXIf", EXIF)), id="PNG with EXIF"),
    pytest.param(encode_image(draw_noise(), "WEBP", exif=b"Exif\0\0" + EXIF), id="WebP with EXIF"),
    pytest.param(build_jpeg_with_exif(EXIF), id="JPEG with EXIF in three segments"),
]


@pytest.mark.parametrize("data", METADATA)
def test_header_takes_little_memory_for_metadata(data: bytes) -> None:
    read_header(PNG)  # imports the decoders
    assert measure_header(data) < 10 * len(data)


REFUSED = [
    pytest.param(build_jpeg_with_exif(bytes(MAX_EXIF_BYTES)), "bytes of EXIF data", id="JPEG with large EXIF"),
    pytest.param(build_jpeg(build_segment(0xEE, b"") * (MAX_SEGMENTS + 1)), "segments", id="JPEG with many segments"),
    pytest.param(
        build_jpeg(b"\xff\xd9" + build_segment(0xEE, b"") * (MAX_SEGMENTS + 1)), "segments", id="behind an end of image"
    ),
    pytest.param(
        build_jpeg((b"\xff\xf0\x7d\x02" + build_segment(0xEE, b"") * 8000) * 3), "segments", id="in skipped segments"
    ),
    pytest.param(build_jpeg(bytes(MAX_JUNK_BYTES + 1)), "between its segments", id="JPEG with zeros"),
    pytest.param(JPEG[:3] + bytes(MAX_JUNK_BYTES + 1), "between its segments", id="JPEG of zeros"),
    pytest.param(build_png(*[(b"abCd", b"")] * (MAX_SEGMENTS + 1)), "chunks", id="PNG with many chunks"),
    pytest.param(GIF[:13] + GIF[13:781] + b"!\xfe" + b"\1x" * (MAX_SEGMENTS + 1), "GIF with", id="GIF with a comment"),
    pytest.param(GIF[:781] + b"!\xf9\0" + b"\1x" * (MAX_SEGMENTS + 1), "GIF with", id="GIF with an empty block first"),
    pytest.param(GIF[:781] + bytes(MAX_JUNK_BYTES + 1), "GIF with", id="GIF with zeros"),
    pytest.param(b"MM\0+" + build_tiff()[4:], "big-endian BigTIFF", id="big-endian BigTIFF"),
    pytest.param(build_tiff((273, BYTE, 1 << 20 | 1), size=1 << 21), "tag 273", id="offsets of strips as bytes"),
    pytest.param(
        build_tiff(*((tag, RATIONAL, 90_000) for tag in range(40_000, 40_012)), size=9 << 20),
        "tags have 1080007 values",
        id="TIFF with many values in several tags",
    ),
    pytest.param(
        build_tiff(below=tuple((tag, RATIONAL, 90_000) for tag in range(40_000, 40_012)), size=9 << 20),
        "tags have 1080008 values",
        id="TIFF with many values in its EXIF",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_metadata_without_a_limit_is_refused_before_the_image_is_opened(data: bytes, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidImage, match=message):
        read_size(data)
    assert time.perf_counter() - started < 0.5


@pytest.mark.filterwarnings("ignore")
def test_metadata_is_part_of_the_estimate_and_reserved_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    open_encoded = image_headers.open_encoded

    def record(data: bytes) -> object:
        reserved.append(IMAGE_MEMORY.reserved_bytes)
        return open_encoded(data)

    monkeypatch.setattr(image_headers, "open_encoded", record)
    small = read_header(build_tiff())
    data = build_tiff((273, LONG, 60_000), (282, RATIONAL, 20_000))
    metadata_bytes = check_structure(data).metadata_bytes
    assert read_header(data).peak_bytes - small.peak_bytes > 80_000 * 230
    assert measure_header(data) < metadata_bytes
    assert reserved == [0, metadata_bytes, metadata_bytes]
    assert IMAGE_MEMORY.reserved_bytes == 0


def test_tiff_with_a_strip_for_each_of_many_rows_is_read() -> None:
    data = encode_image(Image.new("L", (2, 100_000)), "TIFF", compression="packbits", strip_size=2)
    assert check_structure(data).metadata_bytes >= 200_000 * image_tags.VALUE_BYTES  # an offset and a size for each
    assert read_size(data) == (2, 100_000)


def test_header_of_a_png_is_read_without_decoding_it() -> None:
    data = encode_image(Image.new("L", (6000, 6000)), "PNG")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_peak_bytes()
    assert read_size(data) == (6000, 6000)
    assert read_peak_bytes() - before < 8 << 20  # 36 MB of pixels


def read_peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
