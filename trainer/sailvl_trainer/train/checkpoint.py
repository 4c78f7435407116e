"""Checkpoints keyed by parameter name: each rank writes the slices that it owns, and any world size can read them.

A checkpoint is a folder of one safetensors file per rank and a JSON manifest, which is written last: a folder without a
manifest is not a checkpoint. Every file's SHA-256 is in the manifest and is verified before the file is read. Frozen
parameters are not saved; they come from the weights that the stage started from. Neither is the state of any random
generator: nothing draws random numbers during training, and the order of the data follows from the data position.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.data.planner import DataPosition
from sailvl_trainer.errors import ConfigError, DataError
from sailvl_trainer.rank.collectives import all_gather_values
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.files import sync_directory, sync_file, translate_storage_errors, write_atomic
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import find_newest_attempt, iter_checkpoints
from sailvl_trainer.train.engine import STATE_KEYS, Fragment

FORMAT = 1
"""Version of the layout below; a checkpoint of another version is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Progress of a training stage: everything that a resume needs beside weights and optimizer state."""

    step: int = 0
    """Optimizer steps done, including skipped ones."""
    tokens: int = 0
    """Tokens trained on, without padding and without skipped steps."""
    samples: int = 0
    """Samples trained on, without skipped steps."""
    skipped_steps: int = 0
    """Steps among `step` whose data was skipped and that made no update."""
    skipped_samples: int = 0
    """Samples of the skipped steps."""
    loss: float | None = None
    """Training loss of the latest step; None before the first one."""
    data: DataPosition
    """Position in the data at which the next step begins."""

    @property
    def updates(self) -> int:
        """Number of updates that the optimizer made."""
        return self.step - self.skipped_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """A contiguous slice of one flattened parameter, and the file that holds it."""

    file: str
    """File name within the checkpoint's folder."""
    start: int
    """Offset in the flattened parameter."""
    numel: int
    """Number of elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterEntry:
    """A saved parameter; its slices cover it without gap or overlap."""

    shape: tuple[int, ...]
    slices: list[TensorSlice] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size and hash of one file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """The contents of `manifest.json`."""

    format: int = FORMAT
    digest: str
    """Digest of the stage's settings; a checkpoint resumes only a stage with the same digest."""
    state: TrainingState
    files: dict[str, FileEntry]
    """Files by name."""
    parameters: dict[str, ParameterEntry]
    """Trainable parameters by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankFile:
    """The file that one rank wrote, with the name, shape and slice of every tensor in it."""

    name: str
    file: FileEntry
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
        write_atomic(folder / MANIFEST_FILE, encode(manifest))
    dist.barrier()


def read_checkpoint_manifest(folder: Path, digest: str) -> CheckpointManifest:
    """Return the manifest of a checkpoint of the stage with this digest.

    Raises DataError if the folder holds no complete checkpoint, or one of another stage.
    """
    try:
        manifest = decode(CheckpointManifest, (folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"checkpoint {folder}: {error}; delete the folder to resume from the previous checkpoint"
        ) from error
    if (manifest.format, manifest.digest) != (FORMAT, digest):
        raise DataError(
            f"checkpoint {folder} has format {manifest.format} and stage digest {manifest.digest[:12]}, expected "
            f"{FORMAT} and {digest[:12]}; delete the folder or give the stage a new name"
        )
    return manifest


def load_checkpoint(folder: Path, manifest: CheckpointManifest, fragments: Iterable[Fragment]) -> None:
    """Fill this rank's fragments from a checkpoint that any number of ranks wrote. COLLECTIVE.

    Raises ConfigError if the trainable parameters differ from the saved ones, DataError if a file is missing or
    altered.
    """
    unread, verified = set(manifest.parameters), set[str]()
    for fragment in fragments:
        saved = manifest.parameters.get(fragment.name)
        if saved is None or tuple(saved.shape) != fragment.shape:
            raise ConfigError(
                f"checkpoint {folder} has no {fragment.name} of shape {fragment.shape}; give the stage a new name"
            )
        unread.discard(fragment.name)
        for tensor_slice in saved.slices:
            if _overlap(tensor_slice, fragment) and tensor_slice.file not in verified:
                _verify_file(folder / tensor_slice.file, manifest.files[tensor_slice.file])
                verified.add(tensor_slice.file)
            _copy_overlap(folder, tensor_slice, fragment)
    unread_by_all = set.intersection(*all_gather_values(set[str], unread))
    if unread_by_all:
        raise ConfigError(
            f"checkpoint {folder} contains parameters that are frozen in this stage: {sorted(unread_by_all)[:3]}; "
            "give the stage a new name"
        )


def delete_old_checkpoints(files: StageFiles, attempt: int, keep: int) -> list[Path]:
    """Delete all checkpoints of this and earlier attempts but the newest `keep` of the lineage; return the deleted.

    It is called after each save, and at an attempt's start to free what a failed save has left. Manifests are deleted
    first, so that a half-deleted folder isn't taken for a checkpoint. An attempt that a later one has superseded
    deletes nothing, since the later one may have started from any of them. At least one checkpoint is kept.
    """
    if find_newest_attempt(files) > attempt:
        return []
    retained = {
        files.storage / checkpoint.path for checkpoint in list(iter_checkpoints(files, attempt))[: max(1, keep)]
    }
    folders = (f for n in range(1, attempt + 1) for f in files.checkpoint_dir(n, 0).parent.glob("step-*"))
    deleted = [folder for folder in folders if folder not in retained]
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
    return _RankFile(name=name, file=_describe_file(folder / name), slices=slices)


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


def _copy_overlap(folder: Path, tensor_slice: TensorSlice, fragment: Fragment) -> None:
    overlap = _overlap(tensor_slice, fragment)
    if overlap is None:
        return
    low, high = overlap
    with safe_open(folder / tensor_slice.file, "pt") as file:
        for key in STATE_KEYS:
            saved = file.get_slice(f"{key}:{fragment.name}")[low - tensor_slice.start : high - tensor_slice.start]
            fragment.tensors[key][low - fragment.start : high - fragment.start].copy_(saved)


def _verify_file(path: Path, written: FileEntry) -> None:
    try:
        found = _describe_file(path)
    except OSError as error:
        raise DataError(
            f"checkpoint file {path}: {error}; delete its folder to resume from the previous checkpoint"
        ) from error
    if found != written:
        raise DataError(
            f"checkpoint file {path} has {found.bytes} bytes with SHA-256 {found.sha256[:12]}, expected "
            f"{written.bytes} with {written.sha256[:12]}; delete its folder to resume from the previous checkpoint"
        )


def _describe_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)
