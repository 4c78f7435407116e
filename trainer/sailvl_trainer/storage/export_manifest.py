"""The manifest of an export: it lists every file of the folder, so that a later stage can verify all that it loads.

transformers loads a model from whatever files lie in its folder, so a file that the manifest doesn't list is refused.
Nothing here imports torch, because a worker compares another run's export with its manifest before it imports that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE, SCHEMA_VERSION
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import UnusableDocumentError, read_document, write_document
from sailvl_trainer.storage.files import translate_read_errors
from sailvl_trainer.storage.hashes import FILE_NAME, FileHash, HashedFile, hash_file

MODEL_CONFIG_FILE = "config.json"
WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportManifest:
    """The contents of an export's `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileHash]
    """All other files by name."""


def write_export_manifest(folder: Path) -> None:
    """Write the sizes and hashes of all files, which a stage of another run verifies before it loads them."""
    roots = DataRoots.resolve(folder)
    files = {path.name: hash_file(path, roots) for path in sorted(folder.iterdir())}
    write_document(folder / MANIFEST_FILE, ExportManifest(files=files), check=_describe_invalid)


def list_export_files(folder: Path, storage: Path) -> list[HashedFile]:
    """Return the files of an export, as its manifest describes them.

    Raises DataError if there is no usable manifest, or if the folder has a file that the manifest doesn't list;
    StorageError if either can't be read.
    """
    try:
        manifest = read_document(
            ExportManifest, folder / MANIFEST_FILE, DataRoots.resolve(folder, storage), check=_describe_invalid
        )
        names = _list_visible_names(folder)
    except (OSError, UnusableDocumentError) as error:
        raise DataError(f"export {folder} has no usable {MANIFEST_FILE}: {error}; train the stage again") from error
    if unlisted := sorted(names - manifest.files.keys() - {MANIFEST_FILE}):
        raise DataError(
            f"export {folder} has {unlisted[0]!r}, which its {MANIFEST_FILE} doesn't list; remove it, because a model "
            "is loaded from all files of its folder"
        )
    return [HashedFile(path=folder / name, expected=expected) for name, expected in sorted(manifest.files.items())]


def _list_visible_names(folder: Path) -> set[str]:
    """Return the names in a folder without hidden ones: network file systems leave some, and transformers reads none.

    Raises OSError if there is no such folder, StorageError if it can't be listed.
    """
    with translate_read_errors(folder):
        return {name for name in os.listdir(folder) if not name.startswith(".")}


def _describe_invalid(manifest: ExportManifest) -> str:
    """Return what is wrong with a manifest's values; empty if nothing is."""
    if not all(FILE_NAME.fullmatch(name) and file.is_valid for name, file in manifest.files.items()):
        return "it lists a file with an impossible name, size or hash"
    if MODEL_CONFIG_FILE not in manifest.files:
        return f"it lists no {MODEL_CONFIG_FILE}"
    return "" if any(name.endswith(WEIGHTS_SUFFIX) for name in manifest.files) else f"it lists no *{WEIGHTS_SUFFIX}"
