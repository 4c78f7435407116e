"""Encode and decode the JSON documents of the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sailvl_trainer.contract import SCHEMA_VERSION, Progress, Stage
from sailvl_trainer.errors import ConfigError

T = TypeVar("T")

CONFIGS = {"curate": "curate", "pretrain": "train", "sft": "train", "evaluate": "evaluate"}
"""Kind → the field of the stage document that holds its settings."""


def decode(type_: type[T], data: bytes | str) -> T:
    """JSON to one of the contract's types. Raises msgspec.ValidationError, a ValueError, that names the field."""
    return msgspec.json.decode(data, type=type_)


def encode(document: Any) -> bytes:
    """One of the contract's documents, or plain data, as JSON."""
    return msgspec.json.encode(document)


def keep_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which JSON has no words for: they would become null, and the document unreadable."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def read_stage(path: Path) -> Stage:
    """The stage document. Raises ConfigError for one that this version can't carry out."""
    try:
        data = path.read_bytes()
        _require_version(path, decode(dict[str, Any], data).get("schema_version"))
        stage = decode(Stage, data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"stage document {path}: {error}") from error
    _require_settings(path, stage)
    if not Path(stage.output).is_relative_to(stage.storage):
        raise ConfigError(f"stage document {path}: output {stage.output} is not below storage {stage.storage}")
    return stage


def read_progress(path: Path) -> Progress | None:
    """How far a rank is; None: it hasn't said."""
    try:
        return decode(Progress, path.read_bytes())
    except FileNotFoundError:
        return None


def _require_version(path: Path, version: Any) -> None:
    """Before anything else is looked at: another version may hold anything."""
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"stage document {path} has schema version {version}, this trainer reads {SCHEMA_VERSION}; "
            "use a trainer image of the operator's version"
        )


def _require_settings(path: Path, stage: Stage) -> None:
    given = [name for name in ("curate", "train", "evaluate") if getattr(stage, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"stage document {path}: give exactly one of curate, train, evaluate; it has {given}")
    if given != [CONFIGS[stage.kind]]:
        raise ConfigError(
            f"stage document {path}: a stage of kind {stage.kind} has its settings in {CONFIGS[stage.kind]}; "
            f"it has {given[0]}"
        )
