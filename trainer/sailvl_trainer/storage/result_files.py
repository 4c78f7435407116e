"""The files that a stage's result consists of, by the kind of the stage: what has to be intact for it to be reused."""

from __future__ import annotations

from pathlib import Path

from sailvl_trainer.contract import EXPORT_DIR, HELD_OUT_DIR, SHARDS_DIR, Kind
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.export_manifest import list_export_files
from sailvl_trainer.storage.hashes import HashedFile
from sailvl_trainer.storage.shard_manifest import list_shard_files, read_shard_manifest


def list_result_files(kind: Kind, output: Path, storage: Path) -> list[HashedFile]:
    """Return the files of a result with what their manifests say: both splits of a curation, the export of a training.

    An evaluation's result consists of its metrics alone. Raises DataError if a manifest can't be used, StorageError if
    it can't be read.
    """
    if kind == "evaluate":
        return []
    if kind != "curate":
        return list_export_files(output / EXPORT_DIR, storage)
    roots = DataRoots.resolve(output, storage)
    folders = output / SHARDS_DIR, output / HELD_OUT_DIR
    return [file for folder in folders for file in list_shard_files(folder, read_shard_manifest(folder, roots))]
