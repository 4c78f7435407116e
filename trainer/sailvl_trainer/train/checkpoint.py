"""Checkpoints keyed by parameter name: each rank writes the slices that it owns, and any world size can read them.

A checkpoint is a folder of one safetensors file per rank and a JSON manifest, which is written last: a folder without a
manifest is not a checkpoint. Every file's SHA-256 is in the manifest and is verified before the file is read. Frozen
parameters are not saved; they come from the weights that the stage started from. Neither is the state of any random
generator: nothing draws random numbers during training, and the order of the data follows from the data position.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.errors import ConfigError, StorageError
from sailvl_trainer.rank.collectives import all_gather_values
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import write_document
from sailvl_trainer.storage.files import (
    describe_unreadable,
    explain_storage_error,
    is_existing,
    list_names,
    sync_directory,
    sync_file,
    translate_storage_errors,
)
from sailvl_trainer.storage.hashes import FileHash, HashedFile, describe_difference, hash_file
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import find_newest_attempt, iter_checkpoints, read_lineage
from sailvl_trainer.train.checkpoint_manifest import (
    CheckpointManifest,
    DamagedCheckpointError,
    ParameterEntry,
    TensorSlice,
    TrainingState,
    read_checkpoint_manifest,
)
from sailvl_trainer.train.engine import STATE_KEYS, Fragment


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankFile:
    """The file that one rank wrote, with the name, shape and slice of every tensor in it."""

    name: str
    file: FileHash
    slices: list[tuple[str, tuple[int, ...], TensorSlice]]


def save_checkpoint(folder: Path, fragments: Iterable[Fragment], *, digest: str, state: TrainingState) -> None:
    """Write a checkpoint; it exists once the first rank has written its manifest. COLLECTIVE.

    Raises StorageError if the volume is full or unavailable; the folder then has no manifest.
    """
    is_first = dist.get_rank() == 0
    if is_first:
        with translate_storage_errors(folder):
            _create_empty(folder)
    dist.barrier()
    with translate_storage_errors(folder):
        own = _write_fragments(folder, fragments)
    written = all_gather_values(_RankFile, own)
    if is_first:
        manifest = CheckpointManifest(
            digest=digest,
            state=state,
            files={rank_file.name: rank_file.file for rank_file in written},
            parameters=_merge_slices(written),
        )
        sync_directory(folder)
        write_document(folder / MANIFEST_FILE, manifest)
    dist.barrier()


def load_checkpoint(folder: Path, digest: str, fragments: Sequence[Fragment]) -> TrainingState:
    """Fill this rank's fragments from a checkpoint that any number of ranks wrote, and return its state. COLLECTIVE.

    Nothing is filled before all ranks have verified the files that they need. Raises ConfigError if the trainable
    parameters differ from the saved ones; DamagedCheckpointError, on every rank, if a file is missing or altered.
    """
    manifest = _verify_checkpoint(folder, digest, fragments)
    for fragment in fragments:
        for tensor_slice in manifest.parameters[fragment.name].slices:
            _copy_overlap(folder, tensor_slice, fragment)
    unread = set(manifest.parameters) - {fragment.name for fragment in fragments}
    unread_by_all = set.intersection(*all_gather_values(set[str], unread))
    if unread_by_all:
        raise ConfigError(
            f"checkpoint {folder} contains parameters that are frozen in this stage: {sorted(unread_by_all)[:3]}; "
            "give the stage a new name"
        )
    return manifest.state


def delete_old_checkpoints(files: StageFiles, attempt: int, keep: int) -> list[Path]:
    """Delete all checkpoints of this and earlier attempts but the newest `keep` of the lineage; return the deleted.

    It is called after each save, and at an attempt's start to free what a failed save has left. Manifests are deleted
    first, so that a half-deleted folder isn't taken for a checkpoint. An attempt that a later one has superseded
    deletes nothing, since the later one may have started from any of them. Neither does one whose own lineage can't be
    used, and a lineage without checkpoints deletes no complete one. At least one checkpoint is kept. Raises
    StorageError, before anything is deleted, if a lineage or a folder can't be read.
    """
    if find_newest_attempt(files) > attempt or read_lineage(files, attempt) is None:
        return []
    retained = {
        files.storage / checkpoint.path for checkpoint in list(iter_checkpoints(files, attempt))[: max(1, keep)]
    }
    attempts = (files.checkpoint_dir(number, 0).parent for number in range(1, attempt + 1))
    folders = (path / name for path in attempts for name in list_names(path) if name.startswith("step-"))
    deleted = [f for f in folders if f not in retained and (retained or not is_existing(f / MANIFEST_FILE))]
    for folder in deleted:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return deleted


def _create_empty(folder: Path) -> None:
    """Create the folder, without the files of a killed attempt to write it; a manifest would be deleted first."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync_directory(folder.parent)


def _write_fragments(folder: Path, fragments: Iterable[Fragment]) -> _RankFile:
    name = f"rank-{dist.get_rank():05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    slices = []
    for fragment in fragments:
        if fragment.numel:
            tensors |= {f"{key}:{fragment.name}": fragment.tensors[key].cpu().clone() for key in STATE_KEYS}
            tensor_slice = TensorSlice(file=name, start=fragment.start, numel=fragment.numel)
            slices.append((fragment.name, fragment.shape, tensor_slice))
    save_file(tensors, folder / name)
    sync_file(folder / name)
    return _RankFile(name=name, file=hash_file(folder / name, DataRoots.resolve(folder)), slices=slices)


def _merge_slices(written: list[_RankFile]) -> dict[str, ParameterEntry]:
    """Collect all ranks' slices by parameter, and assert that they cover each one without gap or overlap."""
    merged: dict[str, ParameterEntry] = {}
    for name, shape, tensor_slice in (entry for rank_file in written for entry in rank_file.slices):
        merged.setdefault(name, ParameterEntry(shape=shape)).slices.append(tensor_slice)
    for name, parameter in merged.items():
        end = 0
        for tensor_slice in sorted(parameter.slices, key=lambda s: s.start):
            assert tensor_slice.start == end, f"{name}: a gap or an overlap at {end}: {parameter.slices}"
            end += tensor_slice.numel
        assert end == math.prod(parameter.shape), f"{name}: {end} elements for shape {parameter.shape}"
    return merged


def _overlap(tensor_slice: TensorSlice, fragment: Fragment) -> tuple[int, int] | None:
    """Return the range of the flattened parameter that both hold; None if there is none."""
    low = max(tensor_slice.start, fragment.start)
    high = min(tensor_slice.start + tensor_slice.numel, fragment.start + fragment.numel)
    return (low, high) if low < high else None


def _verify_checkpoint(folder: Path, digest: str, fragments: Sequence[Fragment]) -> CheckpointManifest:
    """Return the manifest once every rank has verified what it needs. COLLECTIVE. Raises as `load_checkpoint`."""
    manifest, damage = None, ""
    try:
        manifest = read_checkpoint_manifest(folder, digest)
        _check_shapes(folder, manifest, fragments)
        _verify_files(folder, manifest, fragments)
    except DamagedCheckpointError as error:
        damage = str(error)
    damages = [text for text in all_gather_values(str, damage) if text]
    if damages or manifest is None:
        raise DamagedCheckpointError(damages[0])
    return manifest


def _check_shapes(folder: Path, manifest: CheckpointManifest, fragments: Sequence[Fragment]) -> None:
    for fragment in fragments:
        saved = manifest.parameters.get(fragment.name)
        if saved is None or tuple(saved.shape) != fragment.shape:
            raise ConfigError(
                f"checkpoint {folder} has no {fragment.name} of shape {fragment.shape}; give the stage a new name"
            )


def _verify_files(folder: Path, manifest: CheckpointManifest, fragments: Sequence[Fragment]) -> None:
    """Verify the files that hold a part of the fragments. Raises DamagedCheckpointError."""
    needed: dict[str, list[tuple[str, TensorSlice]]] = {}
    for fragment in fragments:
        for tensor_slice in manifest.parameters[fragment.name].slices:
            if _overlap(tensor_slice, fragment):
                needed.setdefault(tensor_slice.file, []).append((fragment.name, tensor_slice))
    for name, slices in needed.items():
        file = HashedFile(path=folder / name, expected=manifest.files[name])
        problem = describe_difference(file, DataRoots.resolve(folder)) or _describe_wrong_tensor(file.path, slices)
        if problem:
            raise DamagedCheckpointError(f"checkpoint file {file.path}: {problem}")


def _describe_wrong_tensor(path: Path, slices: Sequence[tuple[str, TensorSlice]]) -> str:
    """Return which tensor of a file isn't as the manifest says; empty if all are. Only the header is read.

    The file was hashed before, so that it isn't missing: safetensors raises FileNotFoundError for whatever keeps it
    from opening a file, such as too many open ones. Raises StorageError then.
    """
    try:
        with safe_open(path, "pt") as file:
            for name, tensor_slice in slices:
                for key in STATE_KEYS:
                    shape = file.get_slice(f"{key}:{name}").get_shape()
                    if shape != [tensor_slice.numel]:
                        return f"{key} of {name} has shape {shape}, expected {[tensor_slice.numel]}"
    except SafetensorError as error:
        return str(error)
    except OSError as error:
        raise StorageError(explain_storage_error(error, path) or describe_unreadable(path, error)) from error
    return ""


def _copy_overlap(folder: Path, tensor_slice: TensorSlice, fragment: Fragment) -> None:
    overlap = _overlap(tensor_slice, fragment)
    if overlap is None:
        return
    low, high = overlap
    with safe_open(folder / tensor_slice.file, "pt") as file:
        for key in STATE_KEYS:
            saved = file.get_slice(f"{key}:{fragment.name}")[low - tensor_slice.start : high - tensor_slice.start]
            fragment.tensors[key][low - fragment.start : high - fragment.start].copy_(saved)
