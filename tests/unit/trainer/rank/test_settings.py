"""What a worker is told: its environment, its stage document, its share of the machine; what it says of a mistake."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.contract import (
    Env,
    ExitCode,
    Result,
    Termination,
)
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.rank.cgroup import count_cores
from sailvl_trainer.rank.settings import Settings, read_settings
from sailvl_trainer.storage.codec import decode, encode, read_stage
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.main import prepare_environment
from tests.support.builders.worker import build_stage


def test_a_stage_file_is_all_that_a_worker_needs() -> None:
    assert read_settings({Env.STAGE_FILE: "/s.json"}) == Settings(
        stage_file=Path("/s.json"),
        nodes=1,
        node_rank=0,
        node_name="",
        processes_per_node=1,
        device="cpu",
        rendezvous_host="localhost",
        rendezvous_port=29500,
        metrics_port=9400,
        in_place_restarts=0,
        grace_seconds=30,
        stall_timeout_seconds=0,
        termination_log=Path("/dev/termination-log"),
        scratch=Path("/tmp/sailvl"),
    )


def test_workers_that_share_a_machine_have_ports_of_their_own() -> None:
    environment = {Env.STAGE_FILE: "/s.json", Env.METRICS_PORT: "9000", Env.METRICS_PORT_OFFSET: "3"}
    assert read_settings(environment).metrics_port == 9003


WRONG_ENVIRONMENTS = [
    pytest.param({Env.STAGE_FILE: ""}, "SAILVL_STAGE_FILE is not set; set it to the path", id="no stage file"),
    pytest.param({Env.NODES: "two"}, "SAILVL_NODES is 'two'; set a whole number", id="no number"),
    pytest.param({Env.NODES: "0"}, "SAILVL_NODES is 0; set at least 1", id="no worker"),
    pytest.param(
        {Env.NODES: "2", Env.NODE_RANK: "2"}, "SAILVL_NODE_RANK is 2; set a number from 0 to 1", id="index too high"
    ),
    pytest.param({Env.PROCESSES_PER_NODE: "0"}, "SAILVL_PROCESSES_PER_NODE is 0", id="no rank"),
    pytest.param({Env.DEVICE: "tpu"}, "SAILVL_DEVICE is 'tpu'; set cuda or cpu", id="device"),
    pytest.param({Env.GRACE_SECONDS: "-1"}, "SAILVL_GRACE_SECONDS is -1; set at least 0", id="negative"),
]


@pytest.mark.parametrize(("environment", "words"), WRONG_ENVIRONMENTS)
def test_a_wrong_environment_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings({Env.STAGE_FILE: "/s.json"} | environment)
    assert words in str(error.value)


WRONG_STAGES: list[Any] = [
    pytest.param({"schema_version": 9, "kind": "unheard of"}, "schema version 9", id="another version, whatever else"),
    pytest.param({"schema_version": None}, "schema version None", id="no version"),
    pytest.param({"kind": "sft"}, "kind sft has its settings in train; it has curate", id="settings of another kind"),
    pytest.param({"curate": None}, "exactly one of curate, train, evaluate; it has []", id="no settings"),
    pytest.param({"curate": {}}, "missing required field `sources`", id="a field is missing"),
    pytest.param({"output": "/elsewhere"}, "output /elsewhere is not below storage", id="outside the storage"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_STAGES)
def test_a_wrong_stage_document_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps(json.loads(encode(build_stage(tmp_path))) | changes))
    with pytest.raises(ConfigError) as error:
        read_stage(path)
    assert words in str(error.value)


def test_a_good_stage_document_is_read(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(build_stage(tmp_path)))
    assert read_stage(path) == build_stage(tmp_path)


QUOTAS = [
    pytest.param("max 100000\n", None, id="no quota"),
    pytest.param("100000 100000\n", 1, id="one core"),
    pytest.param("50000 100000\n", 1, id="half a core is one"),
    pytest.param("99900000 100000\n", None, id="more than there are"),
]


@pytest.mark.parametrize(("words", "cores"), QUOTAS)
def test_cores_of_a_container(tmp_path: Path, words: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(words)
    assert count_cores(tmp_path / "cpu.max") == (cores or count_cores(tmp_path / "nowhere"))


def run_worker(tmp_path: Path, **environment: str) -> tuple[int, Termination]:
    """A whole worker that ends before it has ranks."""
    log = tmp_path / "termination"
    variables = {Env.TERMINATION_LOG: str(log), Env.SCRATCH: str(tmp_path / "s"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "sailvl_trainer"], env=variables | environment, timeout=30, check=False
    )
    return done.returncode, decode(Termination, log.read_bytes())


def test_a_worker_without_a_stage_says_what_to_set(tmp_path: Path) -> None:
    code, said = run_worker(tmp_path)
    assert (code, said.exit_code) == (64, 64)
    assert "set it to the path of the stage document" in said.message


def test_a_worker_with_another_operators_stage_says_so(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(replace(build_stage(tmp_path), schema_version=9)))
    code, said = run_worker(tmp_path, **{Env.STAGE_FILE: str(path)})
    assert (code, said.exit_code) == (64, 64)
    assert "use a trainer image of the operator's version" in said.message


def test_a_taken_metrics_port_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(build_stage(tmp_path)))
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = run_worker(tmp_path, **{Env.STAGE_FILE: str(path), Env.METRICS_PORT: port})
    assert code == ExitCode.CONFIG
    assert f"port {port} for metrics is taken" in said.message


def test_a_result_is_handed_over_without_starting_ranks(tmp_path: Path) -> None:
    stage = build_stage(tmp_path)
    path = tmp_path / "stage.json"
    path.write_bytes(encode(stage))
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
    StageFiles(stage).write_result(result)
    assert run_worker(tmp_path, **{Env.STAGE_FILE: str(path)}) == (
        0,
        Termination(exit_code=0, result=replace(result, reused=True)),
    )


def test_sigterm_is_answered_before_torch_is_there() -> None:
    """The entry must not import it: that takes seconds, in which PID 1 would ignore the signal."""
    code = "import sys, sailvl_trainer.worker.main; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


def test_a_child_of_a_dead_parent_does_not_begin() -> None:
    command = [sys.executable, "-m", "sailvl_trainer.rank.bootstrap", "999999999", "nowhere", "nothing"]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("given", "home"),
    [
        pytest.param({}, "/tmp", id="none"),
        pytest.param({"HOME": "/nowhere"}, "/tmp", id="one that isn't there"),
        pytest.param({"HOME": "/var/tmp"}, "/var/tmp", id="one that can be written to"),
    ],
)
def test_a_worker_has_a_home_that_can_be_written_to(given, home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: path in ("/tmp", "/var/tmp"))  # root may write anywhere
    prepare_environment(given)
    assert given == {"HOME": home, "USER": "sailvl", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def test_what_is_set_stays():
    given = {"HOME": "/tmp", "USER": "me", "HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HOME": "/data/hf"}
    environment = dict(given)
    prepare_environment(environment)
    assert environment == given
