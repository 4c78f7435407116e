"""A worker that ends before it starts ranks, and the environment that it prepares for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import Env, ExitCode, Result, Termination
from sailvl_trainer.rank.settings import Settings
from sailvl_trainer.storage.codec import decode, encode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.main import add_result, prepare_environment
from sailvl_trainer.worker.ranks import RankProcesses
from tests.support.builders.worker import build_stage


def run_worker(tmp_path: Path, **environment: str) -> tuple[int, Termination]:
    """Run a worker that ends before it starts ranks; return its exit code and termination message."""
    log = tmp_path / "termination"
    variables = {Env.TERMINATION_LOG: str(log), Env.SCRATCH: str(tmp_path / "s"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "sailvl_trainer"], env=variables | environment, timeout=30, check=False
    )
    return done.returncode, decode(Termination, log.read_bytes())


def test_worker_without_stage_config_names_the_variable(tmp_path: Path) -> None:
    code, termination = run_worker(tmp_path)
    assert (code, termination.exit_code) == (64, 64)
    assert "set it to the path of the stage document" in termination.message


def test_stage_config_of_another_version_asks_for_a_matching_image(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(replace(build_stage(tmp_path), schema_version=9)))
    code, termination = run_worker(tmp_path, **{Env.STAGE_FILE: str(path)})
    assert (code, termination.exit_code) == (64, 64)
    assert "use a trainer image of the operator's version" in termination.message


def test_metrics_port_in_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(build_stage(tmp_path)))
    with socket.create_server(("", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        code, termination = run_worker(tmp_path, **{Env.STAGE_FILE: str(path), Env.METRICS_PORT: port})
    assert code == ExitCode.CONFIG
    assert f"port {port} for metrics is in use" in termination.message


def write_result(root: Path, *, run: str) -> Result:
    """Write the result of a run's stage, of whose files there are none, and return it as found again."""
    result = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output=f"{run}/curate")
    StageFiles(build_stage(root, run=run)).write_result(result)
    return replace(result, reused=True)


def test_own_result_is_reported_without_starting_ranks_or_importing_torch(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(encode(build_stage(tmp_path)))
    result = write_result(tmp_path, run="demo")
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    modules = ":".join([str(tmp_path), *sys.path])
    found = run_worker(tmp_path, **{Env.STAGE_FILE: str(path), "PYTHONPATH": modules})
    assert found == (0, Termination(exit_code=0, result=result))


LOST = Termination(exit_code=ExitCode.PEER_LOST, message="lost the connection to worker 0")


@pytest.mark.parametrize(
    ("run", "is_recorded", "has_started", "is_success"),
    [
        pytest.param("demo", False, False, True, id="own result"),
        pytest.param("demo", False, True, False, id="own result after the ranks started"),
        pytest.param("other", False, False, False, id="result of another run"),
        pytest.param("other", True, False, True, id="reused result of another run"),
    ],
)
def test_worker_that_lost_its_peers_before_it_started_ranks_succeeds_only_with_a_usable_result(
    run: str, is_recorded: bool, has_started: bool, is_success: bool, tmp_path: Path
) -> None:
    """Peers that have found a usable result exit, and worker 0 takes the rendezvous with it."""
    stage, ranks = build_stage(tmp_path), RankProcesses()
    result = write_result(tmp_path, run=run)
    if is_recorded:
        StageFiles(stage).record_reuse(result)
    if has_started:
        ranks.set_running(())
    settings = Settings(stage_file=tmp_path / "stage.json", nodes=2, node_rank=1)
    ended = add_result(LOST, settings, StageFiles(stage), ranks)
    assert ended == (Termination(exit_code=0) if is_success else LOST)


def test_worker_handles_sigterm_before_it_imports_torch() -> None:
    """The import takes seconds, in which PID 1, without a handler, would ignore the signal."""
    code = "import sys, sailvl_trainer.worker.main; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("given", "home"),
    [
        pytest.param({}, "/tmp", id="not set"),
        pytest.param({"HOME": "/nowhere"}, "/tmp", id="missing"),
        pytest.param({"HOME": "/var/tmp"}, "/var/tmp", id="writable"),
    ],
)
def test_home_is_writable(given: dict[str, str], home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path in ("/tmp", "/var/tmp"))  # root can write to any directory
    prepare_environment(given)
    assert given == {"HOME": home, "USER": "sailvl", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def test_variables_that_are_set_are_kept() -> None:
    given = {"HOME": "/tmp", "USER": "me", "HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HOME": "/data/hf"}
    environment = dict(given)
    prepare_environment(environment)
    assert environment == given
