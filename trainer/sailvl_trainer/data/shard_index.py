"""Read the Arrow index of a shard without trusting it.

The file is read as the stream of messages that it contains: its footer, which names places, is never used.
Only batches that aren't compressed are accepted, so that all columns are views of the mapped file. Types, nulls and
ranges are checked before any value is used.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from sailvl_trainer.storage.data_files import DataRoots, open_data_file

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("suffix", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_sha256", pa.binary()),
        ("text_tokens", pa.int32()),
        ("loss_tokens", pa.int32()),
    ]
)
"""Columns of an index. Offsets and sizes are bytes within the tar; image_size is 0 without an image. Width and height
are pixels of the upright image. `text_tokens` (tokens without image tokens) and `loss_tokens` were counted by the
tokenizer named in COUNTED_BY; -1 if they weren't counted."""
COUNTED_BY = b"sailvl.counted_by"
"""Metadata key of an index: the fingerprint of the tokenizer and chat template that counted its tokens."""
MAX_COUNTED_BY_LENGTH = 256
MAGIC = b"ARROW1\0\0"
_MESSAGE_HEADER, _BATCH_COMPRESSION = 2, 3
"""Numbers of the fields `header` of a Message and `compression` of a RecordBatch in Arrow's FlatBuffers schemas."""


class InvalidIndexError(ValueError):
    """An index can't be used; the message says why, without its path."""


def read_index(path: Path, roots: DataRoots) -> pa.Table:
    """Return the memory-mapped index in a file. Raises OSError, RefusedFileError or InvalidIndexError."""
    content = map_file(path, roots)
    try:
        return _decode_index(content)
    except MemoryError:  # an ArrowException, too
        raise
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:  # the content is in memory
        raise InvalidIndexError(f"not an Arrow file of uncompressed batches: {error}") from error


def map_file(path: Path, roots: DataRoots) -> pa.Buffer:
    """Return the content of a regular file below the roots, memory-mapped."""
    with open_data_file(path, roots) as file, pa.memory_map(f"/proc/self/fd/{file.fileno()}") as source:
        return source.read_buffer()


def find_invalid_row(index: pa.Table, tar_bytes: int) -> tuple[int, str] | None:
    """Return the first row with values that are impossible for a tar of this size, and the reason; None if none is."""
    problems: list[tuple[int, str]] = []

    def check(is_valid_R: np.ndarray, problem: str) -> None:
        if not is_valid_R.all():
            problems.append((int(np.argmin(is_valid_R)), problem))

    columns = {name: read_column(index, name) for name in SCHEMA.names if pa.types.is_integer(SCHEMA.field(name).type)}
    for part in ("image", "json"):
        offset_R, size_R = columns[f"{part}_offset"], columns[f"{part}_size"]
        is_inside_R = (offset_R >= 0) & (size_R >= 0) & (size_R <= tar_bytes) & (offset_R <= tar_bytes - size_R)
        check(is_inside_R, f"the shard is truncated, or the index is wrong: its {part} ends beyond {tar_bytes} bytes")
    has_size_R = (columns["width"] > 0) & (columns["height"] > 0)
    check(has_size_R | (columns["image_size"] <= 0), "its image has no width or no height")
    least = 0 if COUNTED_BY in (index.schema.metadata or {}) else -1
    has_counts_R = (columns["text_tokens"] >= least) & (columns["loss_tokens"] >= least)
    check(has_counts_R, "its number of tokens is negative")
    return min(problems, default=None)


def read_column(index: pa.Table, name: str) -> np.ndarray:
    """Return a numeric column as a read-only view of the mapped file, of shape (R,)."""
    values: np.ndarray = index.column(name).combine_chunks().to_numpy(zero_copy_only=True)
    return values


def _decode_index(content: pa.Buffer) -> pa.Table:
    if content.slice(0, len(MAGIC)).to_pybytes() != MAGIC:
        raise InvalidIndexError("it doesn't begin as an Arrow file")
    messages = iter(pa.ipc.MessageReader.open_stream(content.slice(len(MAGIC))))
    first = next(messages, None)
    if first is None:
        raise InvalidIndexError("it is empty")
    schema = pa.ipc.read_schema(first)
    if not schema.equals(SCHEMA, check_metadata=False):
        raise InvalidIndexError(f"its columns are {schema.names[:20]}, expected {SCHEMA.names}")
    counted_by = (schema.metadata or {}).get(COUNTED_BY, b"").decode()
    if len(counted_by) > MAX_COUNTED_BY_LENGTH:
        raise InvalidIndexError(f"metadata {COUNTED_BY.decode()} has {len(counted_by)} characters")
    batches = [_decode_batch(message, schema) for message in messages]
    if len(batches) > 1:
        raise InvalidIndexError(f"it has {len(batches)} batches; write one")
    index = pa.Table.from_batches(batches, schema)
    index.validate(full=True)
    if any(column.null_count for column in index.columns):
        raise InvalidIndexError("it has empty cells")
    return index


def _decode_batch(message: pa.Message, schema: pa.Schema) -> pa.RecordBatch:
    if message.type != "record batch":
        raise InvalidIndexError(f"it has a message of type {message.type}")
    if _is_compressed(message.metadata.to_pybytes()):
        raise InvalidIndexError("it is compressed")
    return pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Return whether the record batch of a message declares a compression, for which pyarrow has no accessor."""
    (message,) = struct.unpack_from("<I", metadata, 0)
    header = _find_field(metadata, message, _MESSAGE_HEADER)
    if header is None:
        raise InvalidIndexError("a message has no header")
    (distance,) = struct.unpack_from("<I", metadata, header)
    return _find_field(metadata, header + distance, _BATCH_COMPRESSION) is not None


def _find_field(metadata: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a FlatBuffers table; None if the table lacks it."""
    (distance,) = struct.unpack_from("<i", metadata, table)
    vtable = table - distance
    (size,) = struct.unpack_from("<H", metadata, vtable)
    slot = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", metadata, vtable + slot) if slot < size else (0,)
    return table + offset if offset else None
