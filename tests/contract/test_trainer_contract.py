"""Operator and trainer agree on their contract: each reads what the other writes. No cluster is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from sailvl_operator.api.status import Cause
from sailvl_operator.api.types import Defaults
from sailvl_operator.core.desired.workload import build_defaults, build_env, encode_document
from sailvl_operator.core.evidence import Evidence, collect_evidence
from sailvl_operator.core.failure import find_root_cause
from sailvl_operator.core.jobs import build_attempt
from sailvl_operator.core.lifecycle import find_result
from sailvl_operator.core.plan import plan
from sailvl_operator.core.reports import build_terminated
from sailvl_trainer import contract
from sailvl_trainer.contract import (
    METRICS_PORT,
    NON_RETRYABLE_EXIT_CODES,
    RENDEZVOUS_PORT,
    Checkpoint,
    Env,
    ExitCode,
    Result,
    Termination,
)
from sailvl_trainer.rank.settings import read_settings
from sailvl_trainer.rank.termination import encode_termination
from sailvl_trainer.storage.codec import read_stage
from tests.support.builders.operator import build_pod, build_run

OUTPUTS = {name: f"demo/{name}-0" for name in ("curate", "alignment", "knowledge", "evaluate")}
DOWNWARD_API = {Env.NODE_RANK: "1", Env.NODE_NAME: "node-1", Env.POD_IP: "10.1.2.3"}
"""Variables that the downward API sets."""
ON_GPUS = {Env.PROCESSES_PER_NODE, Env.DEVICE}
LOCAL_MODE_ONLY = {
    Env.METRICS_PORT_OFFSET,
    Env.METRICS_PORT,
    Env.RENDEZVOUS_PORT,
    Env.TERMINATION_LOG,
    Env.SCRATCH,
}
"""Variables that only local mode sets; their defaults fit a pod."""


@pytest.mark.parametrize("index", range(4), ids=["curate", "pretrain", "sft", "evaluate"])
def test_trainer_reads_every_stage_config_of_the_operator(tmp_path: Path, index: int) -> None:
    run = build_run()
    document = build_attempt(run, plan(run)[index], attempt=2, outputs=OUTPUTS, defaults=Defaults()).document
    path = tmp_path / "stage.json"
    path.write_text(encode_document(document))
    assert read_stage(path) == document


def test_trainer_reads_every_variable_of_the_operator() -> None:
    run = build_run()
    attempt = build_attempt(run, plan(run)[1], attempt=2, outputs=OUTPUTS, defaults=Defaults(grace_seconds=90))
    given = build_env(attempt, "1a2b") | DOWNWARD_API
    assert set(given) == set(Env) - LOCAL_MODE_ONLY - ON_GPUS
    settings = read_settings(given)
    assert (settings.nodes, settings.node_rank, settings.rendezvous_host) == (2, 1, "demo-alignment-2-0.demo")
    assert (settings.processes_per_node, settings.device) == (1, "cpu")
    assert (settings.rendezvous_secret, settings.pod_ip) == ("1a2b", "10.1.2.3")
    assert (settings.rendezvous_port, settings.metrics_port) == (RENDEZVOUS_PORT, METRICS_PORT), (
        "the ports of the Service"
    )
    assert settings.grace_seconds < 90, "the worker exits before the kubelet kills it"
    assert settings.stall_timeout_seconds == attempt.stall_timeout_seconds


def test_omitted_variables_equal_their_defaults() -> None:
    run = build_run()
    given = (
        build_env(build_attempt(run, plan(run)[1], attempt=1, outputs=OUTPUTS, defaults=Defaults()), "1a2b")
        | DOWNWARD_API
    )
    assert read_settings(build_defaults() | given) == read_settings(given)


def test_trainer_starts_one_rank_per_gpu() -> None:
    run = build_run(workers={"nodes": 2, "gpusPerNode": 4})
    attempt = build_attempt(run, plan(run)[1], attempt=1, outputs=OUTPUTS, defaults=Defaults())
    settings = read_settings(build_env(attempt, "1a2b") | DOWNWARD_API)
    assert (settings.processes_per_node, settings.device) == (4, "cuda")


def end_with(termination: Termination) -> Evidence:
    terminated = build_terminated(
        exit_code=termination.exit_code, reason="Error", message=encode_termination(termination).decode(), finished=1.0
    )
    pod = build_pod("alignment", terminated=terminated, phase="Failed")
    return find_root_cause(collect_evidence([pod], was_running=True))


CAUSES = [
    (ExitCode.CONFIG, Cause.CONFIG),
    (ExitCode.DATA, Cause.DATA),
    (ExitCode.NON_FINITE, Cause.NON_FINITE),
    (ExitCode.OUT_OF_MEMORY, Cause.OUT_OF_MEMORY),
    (ExitCode.STALLED, Cause.STALLED),
    (ExitCode.STORAGE, Cause.CRASH),
    (ExitCode.PREEMPTED, Cause.PREEMPTED),
    (ExitCode.TERMINATED, Cause.PREEMPTED),
    (ExitCode.PEER_LOST, Cause.INFRA),
]


@pytest.mark.parametrize(("code", "cause"), CAUSES, ids=[code.name for code, _ in CAUSES])
def test_operator_maps_exit_code_to_cause(code: ExitCode, cause: Cause) -> None:
    said = Termination(exit_code=code, rank=3, message="what to change", traceback="é" * 9000)
    evidence = end_with(said)
    assert (evidence.cause, evidence.rank, evidence.message) == (cause, 3, "what to change")
    assert evidence.reports_lost_peer is (code is ExitCode.PEER_LOST)


def test_every_exit_code_is_mapped_to_a_cause() -> None:
    assert {code for code, _ in CAUSES} == set(ExitCode) - {ExitCode.OK}
    assert ExitCode.PEER_LOST not in NON_RETRYABLE_EXIT_CODES, "a lost peer may recover"
    assert ExitCode.STALLED not in NON_RETRYABLE_EXIT_CODES


def test_operator_drops_metrics_that_are_not_finite() -> None:
    result = Result(
        stage="alignment",
        kind="pretrain",
        digest="d",
        attempt=1,
        output="demo/alignment-0",
        metrics={"heldOutLoss": 2.0, "loss": float("nan")},
    )
    said = Termination(exit_code=0, result=result, checkpoint=Checkpoint(step=1, path="p"))
    terminated = build_terminated(
        exit_code=0, reason="Completed", message=encode_termination(said).decode(), finished=1.0
    )
    found = find_result([build_pod("alignment", terminated=terminated)])
    assert found is not None
    assert found.metrics == {"heldOutLoss": 2.0}, "a gate can't be evaluated on NaN"


def test_contract_imports_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import sailvl_trainer.contract; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sailvl_trainer"]


def find_public_names(module: ModuleType) -> set[str]:
    """Return the public names that a module defines or imports, without modules and `annotations`."""
    names = {name for name, value in vars(module).items() if not isinstance(value, ModuleType)}
    return {name for name in names if not name.startswith("_")} - {"annotations"}


def test_contract_exports_exactly_its_documented_names() -> None:
    assert find_public_names(contract) == set(contract.__all__)
    assert contract.__all__ == sorted(contract.__all__, key=lambda name: (not name.isupper(), name))


@pytest.mark.parametrize("name", ["stage_config", "storage", "worker"])
def test_contract_exports_every_definition_of_its_modules(name: str) -> None:
    module = sys.modules[f"sailvl_trainer.contract.{name}"]
    helpers = {"dataclass", "enum", "field", "Literal"}
    assert find_public_names(module) - helpers <= set(contract.__all__)


def test_stage_config_is_plain_json() -> None:
    """The operator's JSON encoding equals that of msgspec."""
    run = build_run()
    document = build_attempt(run, plan(run)[0], attempt=1, outputs=OUTPUTS, defaults=Defaults()).document
    assert msgspec.json.decode(encode_document(document)) == msgspec.json.decode(msgspec.json.encode(document))
