"""Token counts of shards whose index was counted by another tokenizer: one file per shard, so that counting can resume.

A file holds the SHA-256 of its payload and the payload: the text tokens of the shard's rows as little-endian int32. Its
name is the hash of the shard's tar, so that the counts can't be taken for those of other data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sailvl_trainer.data.encoder import TokenCounter
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, read_data_file
from sailvl_trainer.storage.documents import identify_file, set_aside
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.shard_manifest import ShardInfo

DTYPE = np.dtype("<i4")
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCountFiles:
    """The files in one folder, of one tokenizer."""

    folder: Path
    counter: TokenCounter

    def is_needed(self, reader: ShardReader) -> bool:
        """Whether the shard's index lacks the counts of this tokenizer."""
        return reader.counted_by != self.counter.fingerprint

    def is_counted(self, info: ShardInfo) -> bool:
        """Whether a shard's file is there and intact."""
        return self.read(info) is not None

    def read(self, info: ShardInfo) -> np.ndarray | None:
        """Return the text tokens of a shard's rows, int32; None if the file is missing or damaged."""
        path, size = self._path(info), DIGEST_BYTES + info.samples * DTYPE.itemsize
        identity = identify_file(path)
        try:
            data = read_data_file(path, DataRoots.resolve(path.parent), max_bytes=size)
        except FileNotFoundError:
            return None
        except RefusedFileError:
            if identity is not None:
                set_aside(path, identity=identity)
            return None
        digest, payload = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if len(payload) != info.samples * DTYPE.itemsize or hashlib.sha256(payload).digest() != digest:
            return None
        text_tokens_R = np.frombuffer(payload, dtype=DTYPE).astype(np.int32)
        return text_tokens_R if (text_tokens_R >= 0).all() else None

    def count(self, info: ShardInfo, reader: ShardReader, on_row: Callable[[int], None]) -> None:
        """Count a shard's text tokens and write its file atomically; `on_row` is called after each row.

        Raises DataError for a record that can't be counted, StorageError if the volume is full or unavailable.
        """
        payload = self.counter.count_shard(reader, on_row).astype(DTYPE).tobytes()
        write_atomic(self._path(info), hashlib.sha256(payload).digest() + payload)

    def _path(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256}.tokens"
