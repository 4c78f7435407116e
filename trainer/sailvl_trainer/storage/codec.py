"""Encode and decode the JSON documents of the contract, and read the two that both processes need.

The worker and its ranks read the stage config with `read_stage`; the worker reads its ranks' progress with
`read_progress`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sailvl_trainer.contract import SCHEMA_VERSION, Progress, Stage
from sailvl_trainer.errors import ConfigError

T = TypeVar("T")

SETTINGS_FIELDS = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}
"""Field of the stage config that holds the settings, by the kind of the stage."""


def decode(type_: type[T], data: bytes | str) -> T:
    """Decode JSON into one of the contract's types.

    Raises ValueError, which names the field if there is one, whatever is wrong with the data.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise ValueError(str(error)) from error


def encode(document: Any) -> bytes:
    """Encode one of the contract's documents, or plain data, as JSON."""
    return msgspec.json.encode(document)


def keep_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without NaN and infinity, which JSON can't represent: they would be written as null."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def read_stage(path: Path) -> Stage:
    """Read and check the stage config. Raises ConfigError if this version of the trainer can't run it."""
    try:
        data = path.read_bytes()
        _check_version(path, decode(dict[str, Any], data).get("schema_version"))
        stage = decode(Stage, data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the stage config {path}: {error}") from error
    _check_settings(path, stage)
    if not Path(stage.output).is_relative_to(stage.storage) or ".." in Path(stage.output).parts:
        raise ConfigError(
            f"stage config {path}: output {stage.output} is not below storage {stage.storage}; set a directory in it"
        )
    return stage


def read_progress(path: Path) -> Progress | None:
    """Return a rank's progress document, or None if the rank has not written one yet."""
    try:
        return decode(Progress, path.read_bytes())
    except FileNotFoundError:
        return None


def _check_version(path: Path, version: Any) -> None:
    """Refuse another schema version before any other field is read, because its fields may mean something else."""
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"stage config {path} has schema version {version}, but this trainer supports {SCHEMA_VERSION}; "
            "use a trainer image of the operator's version"
        )


def _check_settings(path: Path, stage: Stage) -> None:
    """Require exactly one group of settings, the one that belongs to the kind of the stage."""
    given = [name for name in ("curate", "train", "evaluate") if getattr(stage, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"stage config {path} has {given}; set exactly one of curate, train, evaluate")
    if given != [SETTINGS_FIELDS[stage.kind]]:
        raise ConfigError(
            f"stage config {path} has {given[0]}, but a stage of kind {stage.kind} needs {SETTINGS_FIELDS[stage.kind]}"
        )
