"""Tags of TIFF directories, which EXIF data consists of too: a check of their number, and the orientation.

Pillow makes an object of every value of a tag, of up to 30 times the size of the value, and follows pointers to
further directories. So the tags of a TIFF are checked before it is opened, and the orientation in EXIF data is read
here, without any other value. Both walk a directory exactly as Pillow does. Called by image_headers.py
and image_orientation.py.

Format: TIFF 6.0, section 2; BigTIFF has 8 bytes where TIFF has 4, and 2 in the number of tags.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import TiffImagePlugin

from sailvl_trainer.data.image_structure import InvalidImage

MAX_TAGS = 65535
MAX_TAG_VALUES = 1 << 20
"""Maximum number of values of all tags of a TIFF, such as the offsets of its strips."""
VALUE_BYTES = 512
"""Memory for a value, at most: for a rational number 230 bytes, for the offset of a strip 400."""
ORIENTATION_TAG = 0x0112
UPRIGHT = 1
EXIF_TAG, GPS_TAG, INTEROPERABILITY_TAG = 34665, 34853, 40965
DIRECTORY_TAGS = frozenset({EXIF_TAG, GPS_TAG, INTEROPERABILITY_TAG})
"""Tags that point to a directory, which Pillow reads as a whole."""
STRUCTURE_TAGS = frozenset({258, 273, 279, 320, 324, 325, 338, 339})
"""Tags of samples, palette, strips and tiles, over whose values Pillow iterates even if they are bytes."""
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INTEGER_FORMATS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}
_BLOB_TYPES = frozenset({1, 2, 7})
"""Types whose values stay one object: bytes and text."""
_EXIF_PREFIX = re.compile(rb"(?:Exif\0\0){0,2}")
_BIG_ENDIAN_BIGTIFF = b"MM\0+"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Widths and byte order of the numbers of a TIFF."""

    order: str
    """Byte order as in `struct`."""
    is_big: bool
    """Whether it is a BigTIFF."""

    @property
    def offset_format(self) -> str:
        return self.order + ("Q" if self.is_big else "L")

    @property
    def count_format(self) -> str:
        return self.order + ("Q" if self.is_big else "H")

    @property
    def tag_format(self) -> str:
        """Format of number, type and count of a tag, and the width of its value."""
        return self.order + ("HHQ8x" if self.is_big else "HHL4x")

    @property
    def inline_bytes(self) -> int:
        """Size of the values that stand in the place of their offset."""
        return 8 if self.is_big else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tag:
    """A tag of a directory."""

    number: int
    kind: int
    """Number of the type of its values."""
    count: int
    position: int
    """Position of the field with the values, or with their offset."""

    @property
    def size(self) -> int:
        """Number of bytes of all values; 0 for an unknown type."""
        return self.count * _TYPE_BYTES.get(self.kind, 0)

    @property
    def value_count(self) -> int:
        """Number of the values that become objects."""
        is_blob = self.kind in _BLOB_TYPES and self.number not in STRUCTURE_TAGS
        return 0 if is_blob else self.count


def check_tags(data: bytes) -> int:
    """Return the memory that Pillow takes for the tags of a TIFF, in bytes.

    Raises InvalidImage for more than MAX_TAGS in a directory, and for more than MAX_TAG_VALUES values.
    """
    if data.startswith(_BIG_ENDIAN_BIGTIFF):
        raise InvalidImage("big-endian BigTIFF, which can't be read; write the image in another format")
    layout, view = _read_layout(data[:4]), memoryview(data)
    (start,) = struct.unpack_from(layout.offset_format, data, 8 if layout.is_big else 4)
    struct.unpack_from(layout.count_format, data, start)  # raises if it is outside of the file
    for tag in _iter_tags(view, layout, start):
        if tag.value_count > MAX_TAG_VALUES:
            raise InvalidImage(f"TIFF whose tag {tag.number} has {tag.count} values")
    values, size = 0, 0
    for directory in _iter_directories(view, layout, start):
        for tag, _ in _iter_loaded_tags(view, layout, directory):
            values, size = values + tag.value_count, size + tag.size
    if values > MAX_TAG_VALUES:
        raise InvalidImage(f"TIFF whose tags have {values} values")
    return values * VALUE_BYTES + 2 * size


def read_exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in EXIF data: UPRIGHT if it is no integer, None if there is none.

    Raises ValueError or struct.error if the data has no valid header.
    """
    found = _EXIF_PREFIX.match(exif)
    view = memoryview(exif)[found.end() if found else 0 :]
    if not view:
        return None
    layout = _read_layout(bytes(view[:4]))
    if layout.is_big:
        raise ValueError("EXIF data in a BigTIFF")
    (start,) = struct.unpack_from(layout.offset_format, view, 4)
    for tag, position in _iter_loaded_tags(view, layout, start):
        if tag.number == ORIENTATION_TAG:
            orientation = _read_integer(view, layout, tag, position)
            return UPRIGHT if orientation is None else orientation
    return None


def _read_layout(prefix: bytes) -> _Layout:
    if prefix not in TiffImagePlugin.PREFIXES:
        raise ValueError("not a TIFF")
    return _Layout(order="<" if prefix[:2] == b"II" else ">", is_big=prefix[2] == 43)


def _iter_directories(view: memoryview, layout: _Layout, start: int) -> Iterator[int]:
    """Yield the offset of each directory that Pillow reads: the first one, and those that DIRECTORY_TAGS point to."""
    pointers = _read_pointers(view, layout, start)
    yield start
    yield from pointers.values()
    if EXIF_TAG in pointers:
        below = _read_pointers(view, layout, pointers[EXIF_TAG])
        yield from (offset for number, offset in below.items() if number == INTEROPERABILITY_TAG)


def _read_pointers(view: memoryview, layout: _Layout, start: int) -> dict[int, int]:
    """Return number and value of the tags of a directory that point to another one."""
    pointers = {
        tag.number: _read_integer(view, layout, tag, position)
        for tag, position in _iter_loaded_tags(view, layout, start)
        if tag.number in DIRECTORY_TAGS
    }
    return {number: offset for number, offset in pointers.items() if offset is not None and offset >= 0}


def _iter_tags(view: memoryview, layout: _Layout, start: int) -> Iterator[_Tag]:
    """Yield the tags of a directory up to the end of the data. Raises InvalidImage for more than MAX_TAGS."""
    position = start + struct.calcsize(layout.count_format)
    if position > len(view):
        return
    (count,) = struct.unpack_from(layout.count_format, view, start)
    if count > MAX_TAGS:
        raise InvalidImage(f"TIFF with {count} tags")
    tag_bytes = struct.calcsize(layout.tag_format)
    for first in range(position, min(position + count * tag_bytes, len(view) - tag_bytes + 1), tag_bytes):
        number, kind, values = struct.unpack_from(layout.tag_format, view, first)
        yield _Tag(number=number, kind=kind, count=values, position=first + tag_bytes - layout.inline_bytes)


def _iter_loaded_tags(view: memoryview, layout: _Layout, start: int) -> Iterator[tuple[_Tag, int]]:
    """Yield the tags that Pillow takes, each with the position of its values.

    It skips repeated tags, unknown types, and values that together exceed the data, and stops at truncated values.
    """
    seen: set[int] = set()
    outside_bytes = 0
    for tag in _iter_tags(view, layout, start):
        if tag.number in seen or tag.size == 0:
            continue
        position = tag.position
        if tag.size > layout.inline_bytes:
            (position,) = struct.unpack_from(layout.offset_format, view, tag.position)
            outside_bytes += tag.size
            if outside_bytes > len(view):
                continue
            if position + tag.size > len(view):
                return
        seen.add(tag.number)
        yield tag, position


def _read_integer(view: memoryview, layout: _Layout, tag: _Tag, position: int) -> int | None:
    """Return the first value of a tag; None if it is no integer."""
    kind = _INTEGER_FORMATS.get(tag.kind)
    return None if kind is None else int(struct.unpack_from(layout.order + kind, view, position)[0])
