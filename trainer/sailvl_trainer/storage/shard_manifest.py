"""The manifest of a directory of shards: it names every shard, with the sizes and hashes of its tar and its index.

Curation writes it last, so that a directory without one holds no set. Nothing here imports torch or Arrow, because a
worker compares another run's shards with their manifest before it imports either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import UnusableDocumentError, is_count, read_document, write_document
from sailvl_trainer.storage.hashes import FILE_NAME, FileHash, HashedFile

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """A shard's entry in the manifest."""

    name: str
    """File name without suffix."""
    samples: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar."""
    index_bytes: int
    """Size of the index."""
    index_sha256: str
    """Hash of the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """The shards of a directory, in the order of their samples."""

    shards: tuple[ShardInfo, ...]
    version: int = MANIFEST_VERSION

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


def write_shard_manifest(directory: Path, shards: Iterable[ShardInfo]) -> ShardManifest:
    """Write the manifest, after all shards: a directory without one holds no set.

    Raises ConfigError if there are too many shards for a manifest that can be read again.
    """
    manifest = ShardManifest(shards=tuple(sorted(shards, key=lambda s: s.name)))
    advice = "write fewer shards with more samples each, or divide the sources between several stages"
    write_document(directory / MANIFEST_FILE, manifest, check=_describe_invalid, advice=advice)
    return manifest


def read_shard_manifest(directory: Path, roots: DataRoots | None = None) -> ShardManifest:
    """Return the manifest of a directory. Raises DataError if it has none that can be used.

    `roots`: directories that files may be in; by default the set's.
    """
    path = directory / MANIFEST_FILE
    try:
        return read_document(ShardManifest, path, roots or DataRoots.resolve(directory), check=_describe_invalid)
    except (OSError, UnusableDocumentError) as error:
        raise DataError(
            f"{directory} contains no data set: {error}; set the output of a curate stage or a prepared data set"
        ) from error


def list_shard_files(directory: Path, manifest: ShardManifest) -> list[HashedFile]:
    """Return the tars and indexes of a directory, as its manifest describes them."""
    return [
        HashedFile(path=directory / name, expected=expected)
        for info in manifest.shards
        for name, expected in (
            (f"{info.name}.tar", FileHash(bytes=info.bytes, sha256=info.sha256)),
            (f"{info.name}.arrow", FileHash(bytes=info.index_bytes, sha256=info.index_sha256)),
        )
    ]


def _describe_invalid(manifest: ShardManifest) -> str:
    """Return what is wrong with a manifest's values; empty if nothing is."""
    if manifest.version != MANIFEST_VERSION:
        return f"its manifest has version {manifest.version}, but this trainer supports {MANIFEST_VERSION}"
    names = {info.name for info in manifest.shards}
    if len(names) < len(manifest.shards) or not all(map(FILE_NAME.fullmatch, names)):
        return "its manifest names a shard twice, or by another name than that of a file beside it"
    files = (file.expected for file in list_shard_files(Path(), manifest))
    if not all(file.is_valid for file in files) or not is_count(*(info.samples for info in manifest.shards)):
        return "its manifest has a shard with an impossible size, hash or number of samples"
    return ""
