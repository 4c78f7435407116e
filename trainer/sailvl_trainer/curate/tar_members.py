"""Members of an uncompressed tar: a strict reader of the formats ustar, GNU and pax, for tars from untrusted sources.

The sizes in a tar can be negative, lead back to an earlier header, or exceed the file, and extended headers can have
any size. So every member must begin behind the one before it and end within the file, and extended headers are
limited. Members are described by name and place; nothing is extracted. Links, devices and sparse files aren't read, but
described as well, so that the caller can count them. Called by webdataset.py.

Formats: POSIX.1-2017, utility pax, sections "pax Interchange Format" and "ustar Interchange Format"; GNU tar's manual,
section "Basic Tar Format".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Maximum size of an extended header: a long name, or all pax records of a member."""
MAX_PADDING_BYTES = 4 << 20
"""Maximum number of zeros behind the end marker; tar fills its last record, which usually has 10 KiB."""
FILE_TYPES = (b"0", b"\0", b"7")
"""Regular files; Unix version 7 wrote NUL, and 7 is a contiguous file."""
DATALESS_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, directories and pipes: no data follows their header, whatever their size says."""
FOLDER_TYPES = (b"5", b"D", b"V")
"""Directories, those of GNU's incremental archives with a list of names, and GNU's label of the whole tar."""
IRREGULAR_TYPES = {
    b"1": "a hard link; write the tar with --hard-dereference",
    b"2": "a symbolic link; write the tar with --dereference",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
}
LONG_NAME, LONG_LINK, SPARSE = b"L", b"K", b"S"
SPARSE_MAP_FLAG, SPARSE_BLOCK_FLAG = 482, 504
"""Offsets, in the header of a sparse file of old GNU tar and in each block of its map, of the flag that says that a
block of the map follows."""
PAX, PAX_SOLARIS, PAX_GLOBAL = b"x", b"X", b"g"
EXTENSION_TYPES = (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,9}) ([^=\n]{1,1000})=")


class InvalidTarError(ValueError):
    """A tar breaks a rule of its format; the members before that place are intact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """A file in a tar, or a link or device whose data the tar doesn't hold."""

    name: str
    """Path, with surrogates for bytes that are not UTF-8."""
    offset: int
    """Offset of the data within the tar."""
    size: int
    """Number of bytes of the data."""
    problem: str = ""
    """Reason for which the data can't be used; empty for a regular file."""


@dataclass(kw_only=True, slots=True)
class _TarHeader:
    """Header of a member, after which its extended headers may replace name and size."""

    kind: bytes
    name: str
    size: int


@dataclass(kw_only=True, slots=True)
class _Extension:
    """Values from extended headers for the next member; None: its own header applies."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


def iter_tar_members(file: BinaryIO, on_progress: Callable[[], None] = lambda: None) -> Iterator[TarMember]:
    """Yield the members of a tar but directories, in order, until its end marker, a block of zeros.

    `on_progress` is called for each header. Raises InvalidTarError, also for data behind the end marker.
    """
    end, offset, extension = os.fstat(file.fileno()).st_size, 0, _Extension()
    while True:
        on_progress()
        block = _read(file, offset, BLOCK_BYTES)
        if block == bytes(BLOCK_BYTES):
            _check_padding(file, offset + BLOCK_BYTES, end)
            return
        header, data_offset = _parse_header(block, offset), offset + BLOCK_BYTES
        if header.kind in EXTENSION_TYPES:
            _check_size(header.size, data_offset, min(end, data_offset + MAX_EXTENSION_BYTES))
            _read_extension(header.kind, _read(file, data_offset, header.size), extension, offset)
        else:
            if header.kind == SPARSE:
                data_offset = _skip_sparse_map(file, block, data_offset, on_progress)
            _apply_extension(header, extension)
            _check_size(header.size, data_offset, end)
            if header.kind not in FOLDER_TYPES:
                problem = _describe_irregular(header.kind, extension)
                yield TarMember(name=header.name, offset=data_offset, size=header.size, problem=problem)
            extension = _Extension()
        offset = data_offset + -(-header.size // BLOCK_BYTES) * BLOCK_BYTES


def _describe_irregular(kind: bytes, extension: _Extension) -> str:
    """Return why the data of a member can't be used; empty for a regular file."""
    if kind == SPARSE or extension.is_sparse:
        return "a sparse file; write the tar without --sparse"
    return "" if kind in FILE_TYPES else IRREGULAR_TYPES.get(kind, f"a file of the unknown type {kind!r}")


def _skip_sparse_map(file: BinaryIO, block: bytes, offset: int, on_progress: Callable[[], None]) -> int:
    """Return the offset of the data behind the blocks that continue a sparse file's map."""
    has_next = block[SPARSE_MAP_FLAG]
    while has_next:
        on_progress()
        has_next = _read(file, offset, BLOCK_BYTES)[SPARSE_BLOCK_FLAG]
        offset += BLOCK_BYTES
    return offset


def _check_padding(file: BinaryIO, offset: int, end: int) -> None:
    """Raise InvalidTarError if anything but zeros is behind the end marker, such as a second tar."""
    file.seek(offset)
    if file.read(MAX_PADDING_BYTES).strip(b"\0") or end - offset > MAX_PADDING_BYTES:
        raise InvalidTarError(f"{end - offset} bytes follow the end marker at byte {offset - BLOCK_BYTES}")


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise InvalidTarError(f"the file ends at byte {offset + len(data)}, before the tar's end marker")
    return data


def _parse_header(block: bytes, offset: int) -> _TarHeader:
    checksum = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if _parse_number(block[148:156], offset) != checksum:
        raise InvalidTarError(f"neither a header nor the end marker at byte {offset}")
    kind, name, prefix = block[156:157], _decode_name(block[:100]), _decode_name(block[345:500])
    if kind == b"\0" and name.endswith("/"):
        kind = b"5"  # a directory of Unix version 7
    if prefix and kind not in (LONG_NAME, LONG_LINK, SPARSE):
        name = f"{prefix}/{name}"
    return _TarHeader(kind=kind, name=name, size=_parse_number(block[124:136], offset))


def _parse_number(field: bytes, offset: int) -> int:
    """Parse a number in octal digits, or GNU's signed big-endian number, which has the highest bit of the field set."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big", signed=True)
        return number if field[0] == 0xFF else number + (1 << 8 * len(field) - 1)
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise InvalidTarError(f"invalid number in the header at byte {offset}")
    return int(digits[1] or b"0", 8)


def _decode_name(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _check_size(size: int, offset: int, end: int) -> None:
    if not 0 <= size <= end - offset:
        raise InvalidTarError(f"member at byte {offset - BLOCK_BYTES} has {size} bytes, of which {end - offset} fit")


def _read_extension(kind: bytes, data: bytes, extension: _Extension, offset: int) -> None:
    """Take name and size from an extended header; those of links and global headers don't apply to files."""
    if kind == LONG_NAME:
        extension.name = _decode_name(data)
    elif kind in (PAX, PAX_SOLARIS):
        for keyword, value in _iter_pax_records(data, offset):
            extension.is_sparse |= keyword.startswith(b"GNU.sparse.")
            if keyword in (b"path", b"GNU.sparse.name"):
                extension.name = _decode_name(value).rstrip("/")
            elif keyword == b"size":
                extension.size = int(value) if re.fullmatch(rb"[0-9]{1,19}", value) else -1


def _iter_pax_records(data: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keyword and value of each record, which is `LENGTH KEYWORD=VALUE` and a line feed."""
    position = 0
    while position < len(data) and data[position]:
        found = _PAX_RECORD.match(data, position)
        stop = position + int(found[1]) if found else 0
        if found is None or not found.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise InvalidTarError(f"invalid pax record in the extended header at byte {offset}")
        yield found[2], data[found.end() : stop - 1]
        position = stop


def _apply_extension(header: _TarHeader, extension: _Extension) -> None:
    if extension.name is not None:
        header.name = extension.name
    if extension.size is not None:
        header.size = extension.size
    if header.kind in DATALESS_TYPES:
        header.size = 0
