"""Checkpoints by parameter name: each rank writes what it owns, the manifest comes last, any world size reads them.

A frozen parameter is in no checkpoint: it comes from where the stage started. No pickle: safetensors and JSON. No state
of a random generator either: nothing draws between the first step and the last, the data's order is in its plan state.
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
from sailvl_trainer.data.planner import PlanState
from sailvl_trainer.errors import ConfigError, DataError
from sailvl_trainer.rank.distributed import all_gather_object
from sailvl_trainer.storage.atomic import sync_directory, sync_file, write_atomic
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.errors import translate_storage_errors
from sailvl_trainer.train.fragments import KEYS, Fragment

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a stage is."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped_steps: int = 0
    """Of the steps, those whose data was left out: the optimizer made none."""
    skipped_samples: int = 0
    loss: float | None = None
    """Of the latest step."""
    data: PlanState
    """Where the data goes on."""

    @property
    def updates(self) -> int:
        """Steps that the optimizer made."""
        return self.step - self.skipped_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run of numbers of one parameter in one file."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    shape: tuple[int, ...]
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Written last: a folder without one is no checkpoint."""

    format: int = FORMAT
    digest: str
    """Of the stage: what changes the result."""
    position: Position
    files: dict[str, File]
    parameters: dict[str, Parameter]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """What one rank wrote."""

    name: str
    file: File
    runs: list[tuple[str, tuple[int, ...], Run]]


def save(folder: Path, fragments: Iterable[Fragment], *, digest: str, position: Position) -> None:
    """Every rank calls it; the checkpoint exists once the first rank has written the manifest.

    Raises StorageError where the volume is full or gone; the folder then has no manifest.
    """
    is_first = dist.get_rank() == 0
    if is_first:
        with translate_storage_errors(folder):
            _clear(folder)
    dist.barrier()
    with translate_storage_errors(folder):
        own = _write(folder, fragments)
    written = all_gather_object(own)
    if is_first:
        manifest = Manifest(
            digest=digest,
            position=position,
            files={part.name: part.file for part in written},
            parameters=_merge(written),
        )
        sync_directory(folder)
        write_atomic(folder / MANIFEST_FILE, encode(manifest))
    dist.barrier()


def read_manifest(folder: Path, digest: str) -> Manifest:
    """Raises DataError for a folder that holds no whole checkpoint of the stage with this digest."""
    try:
        manifest = decode(Manifest, (folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"checkpoint {folder}: {error}; remove the folder to go on from the one before") from error
    if (manifest.format, manifest.digest) != (FORMAT, digest):
        raise DataError(
            f"checkpoint {folder} is of format {manifest.format} and stage {manifest.digest[:12]}, "
            f"not {FORMAT} and {digest[:12]}; remove the folder or give the stage a new name"
        )
    return manifest


def load(folder: Path, manifest: Manifest, fragments: Iterable[Fragment]) -> None:
    """Fill fragments from a checkpoint of any world size.

    Raises ConfigError when other parameters learn now, DataError for a file that is not as it was written.
    """
    missing, checked = set(manifest.parameters), set[str]()
    for fragment in fragments:
        saved = manifest.parameters.get(fragment.name)
        if saved is None or tuple(saved.shape) != fragment.shape:
            raise ConfigError(
                f"checkpoint {folder} has no {fragment.name} of shape {fragment.shape}; give the stage a new name"
            )
        missing.discard(fragment.name)
        for run in saved.runs:
            if _overlap(run, fragment) and run.file not in checked:
                _require_whole(folder / run.file, manifest.files[run.file])
                checked.add(run.file)
            _copy(folder, run, fragment)
    nowhere = set.intersection(*all_gather_object(missing))
    if nowhere:
        raise ConfigError(f"checkpoint {folder} has parameters that don't learn now: {sorted(nowhere)[:3]}")


def _clear(folder: Path) -> None:
    """Without what a killed predecessor left: its manifest first, so that no half folder looks whole."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync_directory(folder.parent)


def _write(folder: Path, fragments: Iterable[Fragment]) -> _Written:
    name = f"rank-{dist.get_rank():05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    runs = []
    for fragment in fragments:
        if fragment.numel:
            tensors |= {f"{key}:{fragment.name}": fragment.tensors[key].cpu().clone() for key in KEYS}
            runs.append((fragment.name, fragment.shape, Run(file=name, start=fragment.start, numel=fragment.numel)))
    save_file(tensors, folder / name)
    sync_file(folder / name)
    return _Written(name=name, file=_fingerprint(folder / name), runs=runs)


def _merge(written: list[_Written]) -> dict[str, Parameter]:
    """All ranks' runs by parameter; together they cover each one without gap or overlap."""
    merged: dict[str, Parameter] = {}
    for name, shape, run in (entry for part in written for entry in part.runs):
        merged.setdefault(name, Parameter(shape=shape)).runs.append(run)
    for name, parameter in merged.items():
        at = 0
        for run in sorted(parameter.runs, key=lambda r: r.start):
            assert run.start == at, f"{name}: a gap or an overlap at {at}: {parameter.runs}"
            at += run.numel
        assert at == math.prod(parameter.shape), f"{name}: {at} of {parameter.shape}"
    return merged


def _overlap(run: Run, fragment: Fragment) -> tuple[int, int] | None:
    """Where both are, in the flattened parameter."""
    low, high = max(run.start, fragment.start), min(run.start + run.numel, fragment.start + fragment.numel)
    return (low, high) if low < high else None


def _copy(folder: Path, run: Run, fragment: Fragment) -> None:
    both = _overlap(run, fragment)
    if both is None:
        return
    low, high = both
    with safe_open(folder / run.file, "pt") as file:
        for key in KEYS:
            part = file.get_slice(f"{key}:{fragment.name}")[low - run.start : high - run.start]
            fragment.tensors[key][low - fragment.start : high - fragment.start].copy_(part)


def _require_whole(path: Path, written: File) -> None:
    try:
        found = _fingerprint(path)
    except OSError as error:
        raise DataError(f"checkpoint file {path}: {error}; remove its folder to go on from the one before") from error
    if found != written:
        raise DataError(
            f"checkpoint file {path} has {found.bytes} bytes of hash {found.sha256[:12]}, not the {written.bytes} of "
            f"{written.sha256[:12]} that were written; remove its folder to go on from the one before"
        )


def _fingerprint(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(bytes=path.stat().st_size, sha256=digest)
