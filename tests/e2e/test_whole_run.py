"""From `kubectl apply` to an evaluated model: the results of the whole run of `conftest.py`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from sailvl_trainer.contract import SHARDS_DIR, ModelConfig, Stage
from sailvl_trainer.evaluate.answers import Generator
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.storage.codec import decode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.shard_manifest import read_shard_manifest
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import WholeRun, format_table

pytestmark = pytest.mark.e2e

TRAINING = ("alignment", "advance", "knowledge", "instruction", "preference")
STAGES = ("curate", *TRAINING, "evaluate")


def test_run_succeeds(whole_run: WholeRun) -> None:
    conditions = {c["type"]: (c["status"], c["message"]) for c in whole_run.status["conditions"]}
    assert conditions["Succeeded"][0] == "True", conditions
    assert conditions["GatesPassed"] == ("True", "1 of 1 passed")
    assert [(s["name"], s["state"]) for s in whole_run.status["stages"]] == [(name, "Succeeded") for name in STAGES]


@pytest.mark.parametrize("name", TRAINING)
def test_workers_of_each_stage_run_on_different_nodes(whole_run: WholeRun, name: str) -> None:
    last = f"demo-{name}-{whole_run.stage(name)['attempt']}"
    assert len(whole_run.nodes[last]) == 2


@pytest.mark.parametrize("name", TRAINING)
def test_validation_loss_falls_and_depends_on_images(whole_run: WholeRun, name: str) -> None:
    metrics = {key: float(value) for key, value in whole_run.stage(name)["metrics"].items()}
    assert metrics["heldOutLoss"] < metrics["heldOutLossBefore"]
    assert metrics["heldOutLossShuffled"] > metrics["heldOutLoss"] + 0.05


def test_killed_rank_restarts_from_checkpoint(whole_run: WholeRun) -> None:
    alignment = whole_run.stage("alignment")
    assert alignment["attempt"] == 2
    assert alignment["restarts"] == {"Crash": 1}
    assert alignment["lastFailure"]["exitCode"] == 137
    lineage = json.loads((whole_run.storage / alignment["output"] / "attempts/2.json").read_bytes())
    start = lineage["start"]["step"]
    assert start >= 20, "the attempt did not resume from a checkpoint"
    steps = read_trained_samples(build_stage_files(whole_run, alignment), last_attempt=1)
    assert whole_run.status["goodput"]["lostSteps"] == len([step for step in steps if step > start])


@pytest.mark.parametrize("name", TRAINING)
def test_every_sample_is_used_as_often_as_configured(whole_run: WholeRun, name: str) -> None:
    stage = whole_run.stage(name)
    files = build_stage_files(whole_run, stage)
    samples_by_step = read_trained_samples(files, last_attempt=stage["attempt"])
    assert sorted(samples_by_step) == list(range(1, stage["progress"]["steps"] + 1))
    used = Counter(sample for samples in samples_by_step.values() for sample in samples)
    data = read_stage_config(whole_run, stage)["train"]
    total = sum(read_shard_manifest(on_host(whole_run, folder) / SHARDS_DIR).samples for folder in data["data"])
    least, most = min(used.values()), max(used.values())
    assert most - least <= 1, "uses of samples differ by more than one"
    if data["epochs"] == 1.0:
        assert used == Counter(range(total)), "one epoch must use every sample exactly once"


def test_killed_operators_duplicate_and_lose_no_job(whole_run: WholeRun) -> None:
    attempts = {f"demo-{s['name']}-{n}" for s in whole_run.status["stages"] for n in range(1, s["attempt"] + 1)}
    assert set(whole_run.jobs) == attempts
    assert whole_run.recreated_jobs == []
    assert [s["attempt"] for s in whole_run.status["stages"]] == [1, 2, 1, 1, 1, 1, 1]


def test_exported_model_answers_questions(whole_run: WholeRun) -> None:
    export = whole_run.storage / whole_run.stage("preference")["output"] / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    generator = Generator(
        model=model, tokenizer=tokenizer, preset=get_preset("tiny"), device=torch.device("cpu"), max_new_tokens=8
    )
    questions = read_tsv(whole_run.storage / "benchmarks/level-2.tsv", limit=8)
    answers = generator.generate_answers(questions, 1)
    assert all(answers)
    correct = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    assert correct >= 1, list(zip(answers, questions, strict=True))


def test_benchmarks_are_scored(whole_run: WholeRun) -> None:
    metrics = whole_run.stage("evaluate")["metrics"]
    assert float(metrics["score"]) > 20
    report = whole_run.storage / whole_run.stage("evaluate")["output"] / "report"
    assert (report / "index.html").exists()


def test_kubectl_columns_show_every_stage(whole_run: WholeRun) -> None:
    text = format_table(whole_run.columns)
    assert all(f"{name} ({number}/7)" in text for number, name in enumerate(STAGES, 1))
    assert "Completed" in whole_run.columns[-1]


def test_events_describe_the_run(whole_run: WholeRun, kubectl: Kubectl) -> None:
    described = kubectl("-n", whole_run.namespace, "describe", "svr", "demo").stdout
    for message in (
        "Started stage curate (attempt 1)",
        "restarting as attempt 2",
        "Stage evaluate succeeded",
        "All 7 stages succeeded",
    ):
        assert message in described


def test_workers_have_no_service_account_token(whole_run: WholeRun, kubectl: Kubectl) -> None:
    pods = json.loads(kubectl("-n", whole_run.namespace, "get", "pods", "-o", "json").stdout)["items"]
    assert pods
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in pods)


def build_stage_files(whole_run: WholeRun, stage: dict[str, Any]) -> StageFiles:
    """Return a stage's files on the host."""
    output = str(whole_run.storage / stage["output"])
    return StageFiles(
        Stage(
            namespace=whole_run.namespace,
            run="demo",
            stage=stage["name"],
            kind="sft",
            attempt=1,
            digest=stage["digest"],
            storage=str(whole_run.storage),
            output=output,
            model=ModelConfig(preset="tiny"),
        )
    )


def read_stage_config(whole_run: WholeRun, stage: dict[str, Any]) -> dict[str, Any]:
    """Return the config that a stage's workers read."""
    return decode(dict[str, Any], (whole_run.storage / stage["output"] / "config.json").read_bytes())


def on_host(whole_run: WholeRun, path: str) -> Path:
    """Return the host's path of a path in the workers."""
    return Path(str(whole_run.storage) + path.removeprefix("/data"))
