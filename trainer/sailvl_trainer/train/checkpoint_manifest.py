"""The manifest of a checkpoint: its types, and how it is read without trusting it. Used by checkpoint.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint
from sailvl_trainer.data.planner import DataPosition
from sailvl_trainer.errors import DataError
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import (
    FileIdentity,
    UnusableDocumentError,
    identify_file,
    is_count,
    read_document,
    set_aside,
)
from sailvl_trainer.storage.files import translate_read_errors
from sailvl_trainer.storage.hashes import FILE_NAME, FileHash
from sailvl_trainer.storage.layout import StageFiles

FORMAT = 1
"""Version of the layout below; a checkpoint of another version is refused."""

logger = logging.getLogger(__name__)


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
class CheckpointManifest:
    """The contents of `manifest.json`."""

    format: int = FORMAT
    digest: str
    """Digest of the stage's settings; a checkpoint resumes only a stage with the same digest."""
    state: TrainingState
    files: dict[str, FileHash]
    """Files by name."""
    parameters: dict[str, ParameterEntry]
    """Trainable parameters by name."""


class DamagedCheckpointError(DataError):
    """A checkpoint is missing, damaged or of another stage; training can resume from an earlier one."""


def read_checkpoint_manifest(folder: Path, digest: str) -> CheckpointManifest:
    """Return the manifest of a checkpoint of the stage with this digest.

    Raises DamagedCheckpointError if the folder holds no complete checkpoint, or one of another stage; StorageError if
    the manifest can't be read.
    """
    try:
        manifest = read_document(
            CheckpointManifest, folder / MANIFEST_FILE, DataRoots.resolve(folder), check=_describe_invalid
        )
    except (OSError, UnusableDocumentError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {error}") from error
    if manifest.digest != digest:
        raise DamagedCheckpointError(
            f"checkpoint {folder} has stage digest {manifest.digest[:12]}, expected {digest[:12]}"
        )
    return manifest


def is_usable_checkpoint(files: StageFiles, digest: str, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint can be loaded, as far as its manifest and the sizes of its files show.

    A manifest that can't be used is set aside, so that the folder is no checkpoint any more. Raises StorageError if it
    can't be read, or if a file's size can't.
    """
    folder = files.storage / checkpoint.path
    identity = identify_file(folder / MANIFEST_FILE)
    if identity is None:
        return False
    try:
        manifest = read_checkpoint_manifest(folder, digest)
        _check_sizes(folder, manifest)
    except DamagedCheckpointError as error:
        discard_checkpoint(folder, error, identity)
        return False
    return True


def discard_checkpoint(folder: Path, error: DamagedCheckpointError, identity: FileIdentity | None = None) -> None:
    """Set the manifest aside and log why; the next save deletes the folder, as it deletes incomplete ones.

    `identity` is that of the manifest before it was read; another manifest stays.
    """
    logger.warning("%s; training resumes from an earlier checkpoint", error)
    set_aside(folder / MANIFEST_FILE, identity=identity)


def _check_sizes(folder: Path, manifest: CheckpointManifest) -> None:
    """Raise DamagedCheckpointError if a file is missing or has another size; nothing is read."""
    for name, file in manifest.files.items():
        try:
            with translate_read_errors(folder / name):
                size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpointError(f"checkpoint file {folder / name}: {error}") from error
        if size != file.bytes:
            raise DamagedCheckpointError(f"checkpoint file {folder / name} has {size} bytes, expected {file.bytes}")


def _describe_invalid(manifest: CheckpointManifest) -> str:
    """Return what is wrong with a manifest's values; empty if nothing is."""
    if manifest.format != FORMAT:
        return f"its format is {manifest.format}, expected {FORMAT}"
    if not all(FILE_NAME.fullmatch(name) and file.is_valid for name, file in manifest.files.items()):
        return "its manifest lists a file with an impossible name, size or hash"
    state = manifest.state
    counts = (state.step, state.tokens, state.samples, state.skipped_steps, state.skipped_samples)
    if not is_count(*counts, state.data.epoch, state.data.window, state.data.cursor) or state.updates < 0:
        return "its manifest has an impossible number of steps, tokens or samples"
    invalid = next(_iterate_invalid_parameters(manifest), None)
    return "" if invalid is None else f"its slices of {invalid[:200]} leave a gap, overlap, or are in no file"


def _iterate_invalid_parameters(manifest: CheckpointManifest) -> Iterator[str]:
    """Yield the parameters whose slices don't cover their shape, each element once."""
    for name, parameter in manifest.parameters.items():
        end, numel = 0, math.prod(parameter.shape)
        for tensor_slice in sorted(parameter.slices, key=lambda s: s.start):
            if tensor_slice.start != end or tensor_slice.numel < 1 or tensor_slice.file not in manifest.files:
                break
            end += tensor_slice.numel
        if end != numel or not is_count(numel, *parameter.shape):
            yield name
