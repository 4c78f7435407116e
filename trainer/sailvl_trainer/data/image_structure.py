"""Structure of JPEG, PNG and GIF: what Pillow reads without a limit when it opens an untrusted image is checked before.

Pillow makes objects of every segment or chunk in front of the pixels, and parses the EXIF data of a JPEG. Each scan of
a JPEG is a pass over all pixels. Called by image_headers.py; the tags of a TIFF are checked by image_tags.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import JpegImagePlugin

MAX_SCANS = 100
"""Maximum number of scans of a JPEG; encoders write about ten into a progressive one."""
MAX_SEGMENTS = 1 << 14
"""Maximum number of segments of a JPEG, chunks of a PNG or blocks of a GIF that are not pixels."""
MAX_CHUNKS = 1 << 20
"""Maximum number of chunks of a PNG with pixels; encoders write at least some KiB into one."""
MAX_EXIF_BYTES = 1 << 20
"""Maximum size of the EXIF data of a JPEG, which Pillow parses when it opens one."""
MAX_JUNK_BYTES = 1 << 16
"""Maximum number of bytes between the segments of a JPEG or GIF, over which Pillow goes one by one."""
EXIF_FACTOR = 32
"""Memory for EXIF data that is parsed, as a multiple of its size: 230 bytes for a rational number of 8 bytes."""
TEXT_FACTOR = 4
"""Memory for the chunks of a PNG, as a multiple of their size: a text is decoded and split."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset({b"IDAT", b"DDAT", b"fdAT"})
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_ANY_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_CHUNK_NAME = re.compile(rb"\w{4}")
_STANDALONE_MARKERS = (0x01, 0xD8)
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_GIF_EXTENSION, _GIF_IMAGE, _GIF_TRAILER = 0x21, 0x2C, 0x3B
_GIF_COMMENT, _GIF_APPLICATION = 254, 255


class InvalidImage(ValueError):  # noqa: N818  # reads better in a message
    """The bytes can't be decoded to a complete image."""


class ImageTooLarge(InvalidImage):
    """The image exceeds the limit of pixels, or that of the memory for one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageStructure:
    """Properties of an image that are known before Pillow opens it."""

    scans: int = 0
    """Number of scans of a JPEG, 0 for other formats."""
    metadata_bytes: int = 0
    """Memory that Pillow takes for everything but the pixels, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A chunk of a PNG."""

    name: bytes
    position: int
    """Position of its data."""
    size: int
    """Number of bytes of its data, as its header says."""


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG by walking its segments up to the end of the image; thumbnails are in segments.

    Raises InvalidImage for more than MAX_SCANS.
    """
    position, scans = 2, 0
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker in _STANDALONE_MARKERS:
            continue
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise InvalidImage(f"JPEG with more than {MAX_SCANS} scans")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


def measure_segments(data: bytes) -> int:
    """Return the memory that Pillow takes for the segments before the first scan of a JPEG, in bytes.

    Raises InvalidImage for more than MAX_SEGMENTS, MAX_EXIF_BYTES or MAX_JUNK_BYTES.
    """
    position, segments, segment_bytes, exif_bytes, junk_bytes = 2, 0, 0, 0, 0
    while (found := _ANY_MARKER.search(data, position)) is not None:
        junk_bytes += found.start() - position
        marker, position = data[found.end() - 1], found.end()
        _, _, handler = JpegImagePlugin.MARKER.get(0xFF00 | marker, ("", "", None))
        if junk_bytes > MAX_JUNK_BYTES:
            break
        if handler is None:  # Pillow reads on behind it
            junk_bytes += 2
            continue
        size = max(2, int.from_bytes(data[position : position + 2], "big"))
        segments, segment_bytes = segments + 1, segment_bytes + size
        if marker == _APP1 and data.startswith(b"Exif\0\0", position + 2):
            exif_bytes += size
        if segments > MAX_SEGMENTS or exif_bytes > MAX_EXIF_BYTES:
            raise InvalidImage(f"JPEG with {segments} segments and {exif_bytes} bytes of EXIF data")
        if marker == _START_OF_SCAN:
            break
        position += size
    else:
        junk_bytes += len(data) - position
    if junk_bytes > MAX_JUNK_BYTES:
        raise InvalidImage(f"JPEG with more than {MAX_JUNK_BYTES} bytes between its segments")
    return segment_bytes + EXIF_FACTOR * exif_bytes


def iter_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG up to its end, or to a chunk with an invalid name."""
    position = len(PNG_SIGNATURE)
    while position + 8 <= len(data):
        size, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if not _CHUNK_NAME.fullmatch(name) or name == b"IEND":
            return
        yield Chunk(name=name, position=position + 8, size=size)
        position += 12 + size


def measure_chunks(data: bytes) -> int:
    """Return the memory that Pillow takes for the chunks of a PNG that are not pixels, in bytes.

    Raises InvalidImage for more than MAX_SEGMENTS of them, or more than MAX_CHUNKS in total.
    """
    others, chunk_bytes = 0, 0
    for number, chunk in enumerate(iter_chunks(data)):
        if chunk.name not in PIXEL_CHUNKS:
            others, chunk_bytes = others + 1, chunk_bytes + min(chunk.size, len(data))
        if others > MAX_SEGMENTS or number >= MAX_CHUNKS:
            raise InvalidImage(f"PNG with more than {number} chunks")
    return TEXT_FACTOR * chunk_bytes


def check_blocks(data: bytes) -> None:
    """Check what is in front of the first frame of a GIF: extensions of blocks of at most 255 bytes.

    Raises InvalidImage for more than MAX_SEGMENTS or MAX_JUNK_BYTES.
    """
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    blocks = junk_bytes = 0
    while position < len(data) and data[position] not in (_GIF_IMAGE, _GIF_TRAILER):
        if data[position] == _GIF_EXTENSION:
            count, position = _skip_extension(data, position + 1, MAX_SEGMENTS - blocks)
            blocks += count
        else:
            junk_bytes, position = junk_bytes + 1, position + 1
        if blocks > MAX_SEGMENTS or junk_bytes > MAX_JUNK_BYTES:
            raise InvalidImage(f"GIF with more than {blocks} blocks of extensions before its first frame")


def _skip_extension(data: bytes, position: int, max_blocks: int) -> tuple[int, int]:
    """Return the number of blocks of an extension, at most one above `max_blocks`, and the position behind them.

    An empty block ends an extension; where Pillow reads a block of its own first, it may be empty.
    """
    label, position = data[position] if position < len(data) else 0, position + 1
    own = 0 if label == _GIF_COMMENT else 1
    if label == _GIF_APPLICATION and data.startswith(b"NETSCAPE2.0", position + 1):
        own = 2
    blocks = 0
    while position < len(data) and blocks <= max_blocks:
        size = data[position]
        blocks, position = blocks + 1, position + 1 + size
        if size == 0 and blocks > own:
            break
    return blocks, position
