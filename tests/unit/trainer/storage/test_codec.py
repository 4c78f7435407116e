"""Reading the stage config: a valid one is decoded, every other one is refused with a message that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.contract import ExitCode
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.codec import encode, read_stage
from tests.support.builders.worker import build_stage

INVALID_STAGES: list[Any] = [
    pytest.param(
        {"schema_version": 9, "kind": "unheard of"}, "schema version 9", id="another version, whatever the other fields"
    ),
    pytest.param({"schema_version": None}, "schema version None", id="no version"),
    pytest.param({"kind": "sft"}, "has curate, but a stage of kind sft needs train", id="settings of another kind"),
    pytest.param({"curate": None}, "has []; set exactly one of curate, train, evaluate", id="no settings"),
    pytest.param({"curate": {}}, "missing required field `sources`", id="missing field"),
    pytest.param({"output": "/elsewhere"}, "output /elsewhere is not below storage", id="outside the storage"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID_STAGES)
def test_invalid_stage_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(json.loads(encode(build_stage(tmp_path))) | changes))
    with pytest.raises(ConfigError) as error:
        read_stage(path)
    assert message in str(error.value)


def test_output_that_leaves_the_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(replace(build_stage(tmp_path), output=str(tmp_path / "../etc"))))
    with pytest.raises(ConfigError, match="is not below storage"):
        read_stage(path)


def test_valid_stage_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(build_stage(tmp_path)))
    assert read_stage(path) == build_stage(tmp_path)


def test_stage_config_of_another_version_ends_with_the_config_code(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(replace(build_stage(tmp_path), schema_version=2)))
    with pytest.raises(ConfigError, match="schema version 2") as error:
        read_stage(path)
    assert error.value.exit_code == ExitCode.CONFIG
