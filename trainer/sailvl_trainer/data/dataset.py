"""The samples of a data set and their lengths, without their pixels: what planning needs.

Text tokens come from the shards' own index if it was counted by the same tokenizer; tiles follow from width and height.
Called by the training stage before its first step, and by the caption-loss benchmark.
Suffixes: S samples of the set, W requested samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sailvl_trainer.data.encoder import LENGTHS, SampleEncoder, TokenCounter
from sailvl_trainer.data.shards import ShardPool, ShardReader
from sailvl_trainer.data.token_counts import DIGEST_BYTES, TokenCountFiles
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots, open_data_file
from sailvl_trainer.storage.documents import identify_file, set_aside
from sailvl_trainer.storage.files import sync_directory, sync_file, translate_storage_errors
from sailvl_trainer.storage.hashes import HashedFile
from sailvl_trainer.storage.shard_manifest import ShardInfo, list_shard_files, read_shard_manifest

logger = logging.getLogger(__name__)

HASHED_BYTES = 1 << 20
"""Size of the chunks in which a file is hashed."""


@dataclass(frozen=True, kw_only=True)
class ShardDataset:
    """The samples of one or more directories in a fixed order; a sample's number is its index in that order."""

    pool: ShardPool
    starts: np.ndarray
    """Number of each shard's first sample; the last entry is the number of samples."""
    lengths_S: np.ndarray
    """LENGTHS of all samples, in memory or memory-mapped."""
    fingerprint: str
    """Hash of the samples, their lengths and their order."""
    tokens_per_tile: int

    def __len__(self) -> int:
        return len(self.lengths_S)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of an epoch, image tokens included."""
        return int(self.lengths_S["tokens"].sum(dtype=np.int64))

    @cached_property
    def max_tiles(self) -> int:
        """Number of tiles of the image that has the most."""
        return int(self.lengths_S["tiles"].max(initial=0))

    @cached_property
    def truncated_samples(self) -> int:
        """Number of samples that are longer than a pack and are truncated."""
        return int(self.lengths_S["is_truncated"].sum())

    def lengths(self, samples_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and tiles of samples, as int64 arrays of shape (W,)."""
        lengths_W = self.lengths_S[samples_W]
        return lengths_W["tokens"].astype(np.int64), lengths_W["tiles"].astype(np.int64)

    def locate(self, sample: int) -> tuple[ShardReader, int]:
        """Return the reader of a sample's shard, and the sample's row in it."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.pool[shard], sample - int(self.starts[shard])


@dataclass(frozen=True, kw_only=True)
class ShardList:
    """The shards of a split in all data directories, in the order of their samples."""

    files: tuple[HashedFile, ...]
    """Tars and indexes, as the manifests describe them."""
    infos: tuple[ShardInfo, ...]
    pool: ShardPool
    starts: np.ndarray
    """As in ShardDataset."""

    def __len__(self) -> int:
        return len(self.infos)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return int(self.starts[-1])


def list_shards(directories: Sequence[Path], split: str, *, storage: Path | None = None) -> ShardList:
    """List the shards below each directory's `split` folder.

    Files may be links to others below any of the directories or below `storage`. Raises DataError for a directory
    without a usable manifest.
    """
    roots = DataRoots.resolve(*directories, *(() if storage is None else (storage,)))
    manifests = [(folder / split, read_shard_manifest(folder / split, roots)) for folder in directories]
    shards = [(folder, info) for folder, manifest in manifests for info in manifest.shards]
    return ShardList(
        files=tuple(file for folder, manifest in manifests for file in list_shard_files(folder, manifest)),
        infos=tuple(info for _, info in shards),
        pool=ShardPool([(folder, info.name) for folder, info in shards], roots=roots),
        starts=np.cumsum([0, *(info.samples for _, info in shards)]),
    )


def compute_fingerprint(shards: ShardList, encoder: SampleEncoder) -> str:
    """Return the hash of everything that the dataset's lengths and order depend on."""
    hashes = json.dumps([encoder.fingerprint, *(f"{info.sha256} {info.index_sha256}" for info in shards.infos)])
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def build_dataset(shards: ShardList, encoder: SampleEncoder, lengths_S: np.ndarray | None = None) -> ShardDataset:
    """Return the dataset of shards, given their LENGTHS; by default they are measured now, in this process.

    Raises DataError for a shard without its index, or one that differs from the manifest.
    """
    dataset = ShardDataset(
        pool=shards.pool,
        starts=shards.starts,
        lengths_S=measure_lengths(shards, encoder) if lengths_S is None else lengths_S,
        fingerprint=compute_fingerprint(shards, encoder),
        tokens_per_tile=encoder.preset.tokens_per_tile,
    )
    if dataset.truncated_samples:
        logger.warning(
            "%d of %d samples are longer than packTokens (%d) and are truncated",
            dataset.truncated_samples, len(dataset), encoder.pack_tokens,
        )  # fmt: skip
    return dataset


def measure_lengths(
    shards: ShardList,
    encoder: SampleEncoder,
    *,
    counts: TokenCountFiles | None = None,
    out_S: np.ndarray | None = None,
) -> np.ndarray:
    """Return the LENGTHS of all samples, written to `out_S` if given. Images aren't read.

    Text tokens come from the shard's index if it was counted by the same tokenizer, else from `counts`; without either
    they are counted now.
    """
    lengths_S = np.empty(shards.samples, dtype=LENGTHS) if out_S is None else out_S
    for number, info in enumerate(shards.infos):
        reader = shards.pool[number]
        first, end = int(shards.starts[number]), int(shards.starts[number + 1])
        if len(reader) != end - first:
            raise DataError(
                f"shard {reader.path} has {len(reader)} rows, its manifest {end - first}; copy the data set again"
            )
        lengths_S[first:end] = encoder.measure(reader, _read_text_tokens(info, reader, encoder.counter, counts))
    return lengths_S


def write_lengths(path: Path, shards: ShardList, encoder: SampleEncoder, *, counts: TokenCountFiles) -> None:
    """Measure all samples into a file for `load_lengths`, which appears under its name when it is complete.

    The file is a NumPy array followed by its SHA-256. Raises StorageError if the volume is full or unavailable.
    """
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # process ids aren't unique over containers
    try:
        with translate_storage_errors(temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            mapped_S = np.lib.format.open_memmap(temporary, mode="w+", dtype=LENGTHS, shape=(shards.samples,))
            with temporary.open("r+b") as file:  # allocate the space now: on a full disk, writing the map raises SIGBUS
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size + DIGEST_BYTES)
        measure_lengths(shards, encoder, counts=counts, out_S=mapped_S)
        with translate_storage_errors(temporary):
            mapped_S.flush()
            with temporary.open("r+b") as file:
                file.seek(-DIGEST_BYTES, os.SEEK_END)
                file.write(_hash_all_but_digest(temporary))
            sync_file(temporary)
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def has_lengths(path: Path, samples: int) -> bool:
    """Whether a file has the possible LENGTHS of so many samples and is intact; reads all of it.

    A file that isn't is set aside. Raises StorageError if the volume is unavailable.
    """
    identity = identify_file(path)
    with translate_storage_errors(path):
        try:
            is_intact = _read_digest(path) == _hash_all_but_digest(path)
            if is_intact and _are_possible(load_lengths(path), samples):
                return True
        except FileNotFoundError:
            return False
        except (ValueError, EOFError) as error:  # of numpy, for a file that isn't an array; or no regular file
            logger.warning("%s: %s", path, error)
    logger.warning("%s is damaged or of another version; all samples are measured again", path)
    if identity is not None:
        set_aside(path, identity=identity)
    return False


def load_lengths(path: Path) -> np.ndarray:
    """Return the LENGTHS in an intact file, memory-mapped and read-only."""
    lengths_S: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return lengths_S


def _are_possible(lengths_S: np.ndarray, samples: int) -> bool:
    """Return whether an array holds LENGTHS of so many samples, none of which is negative."""
    if lengths_S.dtype != LENGTHS or lengths_S.shape != (samples,):
        return False
    return all(int(lengths_S[name].min(initial=0)) >= 0 for name in ("tokens", "tiles"))


def _read_digest(path: Path) -> bytes:
    with open_data_file(path, DataRoots.resolve(path.parent)) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - DIGEST_BYTES))
        return file.read(DIGEST_BYTES)


def _hash_all_but_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file without its last DIGEST_BYTES bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, HASHED_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def _read_text_tokens(
    info: ShardInfo, reader: ShardReader, counter: TokenCounter, counts: TokenCountFiles | None
) -> np.ndarray:
    if reader.counted_by == counter.fingerprint:
        return reader.column("text_tokens")
    text_tokens_R = None if counts is None else counts.read(info)
    return counter.count_shard(reader) if text_tokens_R is None else text_tokens_R
