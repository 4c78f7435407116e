"""Checkpoints by parameter name: each rank writes what it owns, the manifest comes last, any world size reads them.

A frozen parameter is in no checkpoint: it comes from where the stage started. No pickle: safetensors and JSON.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint
from sailvl_trainer.data.planner import PlanState
from sailvl_trainer.runtime.distributed import gather
from sailvl_trainer.runtime.documents import decode, encode, sync_directory, write_atomic
from sailvl_trainer.runtime.errors import ConfigError, DataError
from sailvl_trainer.runtime.files import StageFiles
from sailvl_trainer.train.fragments import KEYS, Fragment


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
class Manifest:
    """Written last: a folder without one is no checkpoint."""

    step: int
    tokens: int
    samples: int
    data: PlanState
    """Where the data goes on."""
    parameters: dict[str, Parameter]


def save(folder: Path, fragments: Iterable[Fragment], *, step: int, tokens: int, samples: int, data: PlanState) -> None:
    """Every rank calls it; the checkpoint exists once the first rank has written the manifest."""
    rank, runs = dist.get_rank(), []
    tensors: dict[str, torch.Tensor] = {}
    name = f"rank-{rank:05d}.safetensors"
    for fragment in fragments:
        if fragment.numel:
            tensors |= {f"{key}:{fragment.name}": fragment.tensors[key].clone() for key in KEYS}
            runs.append((fragment.name, fragment.shape, Run(file=name, start=fragment.start, numel=fragment.numel)))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    _sync(folder / name)
    everyone = gather(runs)
    if rank == 0:
        parameters = _merge(everyone)
        manifest = Manifest(step=step, tokens=tokens, samples=samples, data=data, parameters=parameters)
        write_atomic(folder / MANIFEST_FILE, encode(manifest))
    dist.barrier()


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError for a folder that holds no whole checkpoint."""
    try:
        return decode(Manifest, (folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"checkpoint {folder}: {error}") from error


def load(folder: Path, manifest: Manifest, fragments: Iterable[Fragment]) -> None:
    """Fill fragments from a checkpoint of any world size. Raises ConfigError when other parameters learn now."""
    missing = set(manifest.parameters)
    for fragment in fragments:
        saved = manifest.parameters.get(fragment.name)
        if saved is None or tuple(saved.shape) != fragment.shape:
            raise ConfigError(
                f"checkpoint {folder} has no {fragment.name} of shape {fragment.shape}; give the stage a new name"
            )
        missing.discard(fragment.name)
        for run in saved.runs:
            _copy_overlap(folder, run, fragment)
    everywhere = set.intersection(*gather(missing))
    if everywhere:
        raise ConfigError(f"checkpoint {folder} has parameters that don't learn now: {sorted(everywhere)[:3]}")


def prune(files: StageFiles, attempt: int, keep: int, newest: Checkpoint) -> None:
    """Remove an attempt's checkpoints beyond the newest `keep`; manifests go first, so no half one looks whole."""
    folders = sorted(files.checkpoint_dir(attempt, 0).parent.glob("step-*"))
    for folder in folders[: max(0, len(folders) - keep)]:
        if folder != files.storage / newest.path:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _merge(everyone: list[list[tuple[str, tuple[int, ...], Run]]]) -> dict[str, Parameter]:
    """All ranks' runs by parameter; together they cover each one without gap or overlap."""
    merged: dict[str, Parameter] = {}
    for name, shape, run in (entry for rank in everyone for entry in rank):
        merged.setdefault(name, Parameter(shape=shape)).runs.append(run)
    for name, parameter in merged.items():
        at = 0
        for run in sorted(parameter.runs, key=lambda r: r.start):
            assert run.start == at, f"{name}: a gap or an overlap at {at}: {parameter.runs}"
            at += run.numel
        assert at == math.prod(parameter.shape), f"{name}: {at} of {parameter.shape}"
    return merged


def _copy_overlap(folder: Path, run: Run, fragment: Fragment) -> None:
    low, high = max(run.start, fragment.start), min(run.start + run.numel, fragment.start + fragment.numel)
    if low >= high:
        return
    with safe_open(folder / run.file, "pt") as file:
        for key in KEYS:
            part = file.get_slice(f"{key}:{fragment.name}")[low - run.start : high - run.start]
            fragment.tensors[key][low - fragment.start : high - fragment.start].copy_(part)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_directory(path.parent)
