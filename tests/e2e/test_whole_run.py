"""From `kubectl apply` to an evaluated model: what the whole run of `conftest.py` shows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from sailvl_trainer.contract import SHARDS_DIR, ModelConfig, Stage
from sailvl_trainer.data.shards import read_shard_manifest
from sailvl_trainer.evaluate.generate import Generator
from sailvl_trainer.evaluate.tsv import read_tsv
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.storage.codec import decode
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.train.sample_log import read_trained_samples
from tests.support.live.cluster import Kubectl
from tests.support.live.whole_run import Story, align

pytestmark = pytest.mark.e2e

TRAINING = ("alignment", "advance", "knowledge", "instruction", "preference")
STAGES = ("curate", *TRAINING, "evaluate")


def test_the_run_succeeds(story: Story) -> None:
    told = {c["type"]: (c["status"], c["message"]) for c in story.status["conditions"]}
    assert told["Succeeded"][0] == "True", told
    assert told["GatesPassed"] == ("True", "1 of 1 passed")
    assert [(s["name"], s["state"]) for s in story.status["stages"]] == [(name, "Succeeded") for name in STAGES]


@pytest.mark.parametrize("name", TRAINING)
def test_workers_of_a_stage_run_on_different_nodes(story: Story, name: str) -> None:
    last = f"demo-{name}-{story.stage(name)['attempt']}"
    assert len(story.nodes[last]) == 2


@pytest.mark.parametrize("name", TRAINING)
def test_held_out_loss_falls_and_pictures_matter(story: Story, name: str) -> None:
    metrics = {key: float(value) for key, value in story.stage(name)["metrics"].items()}
    assert metrics["heldOutLoss"] < metrics["heldOutLossBefore"]
    assert metrics["heldOutLossShuffled"] > metrics["heldOutLoss"] + 0.05


def test_a_killed_rank_is_the_next_attempts_start(story: Story) -> None:
    alignment = story.stage("alignment")
    assert alignment["attempt"] == 2
    assert alignment["restarts"] == {"Crash": 1}
    assert alignment["lastFailure"]["exitCode"] == 137
    lineage = json.loads((story.storage / alignment["output"] / "attempts/2.json").read_bytes())
    start = lineage["start"]["step"]
    assert start >= 20, "it goes on from a checkpoint"
    steps = read_trained_samples(files_of(story, alignment), last_attempt=1)
    assert story.status["goodput"]["lostSteps"] == len([step for step in steps if step > start])


@pytest.mark.parametrize("name", TRAINING)
def test_every_sample_is_used_as_often_as_the_budget_says(story: Story, name: str) -> None:
    stage = story.stage(name)
    files = files_of(story, stage)
    ledger = read_trained_samples(files, last_attempt=stage["attempt"])
    assert sorted(ledger) == list(range(1, stage["progress"]["steps"] + 1))
    used = Counter(sample for samples in ledger.values() for sample in samples)
    data = document_of(story, stage)["train"]
    total = sum(read_shard_manifest(on_host(story, folder) / SHARDS_DIR).samples for folder in data["data"])
    least, most = min(used.values()), max(used.values())
    assert most - least <= 1, "no sample is ahead of another by more than one use"
    if data["epochs"] == 1.0:
        assert used == Counter(range(total)), "one epoch: every sample exactly once"


def test_killed_operators_double_and_lose_nothing(story: Story) -> None:
    attempts = {f"demo-{s['name']}-{n}" for s in story.status["stages"] for n in range(1, s["attempt"] + 1)}
    assert set(story.jobs) == attempts
    assert story.doubled == []
    assert [s["attempt"] for s in story.status["stages"]] == [1, 2, 1, 1, 1, 1, 1]


def test_the_export_answers(story: Story) -> None:
    export = story.storage / story.stage("preference")["output"] / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    generator = Generator(
        model=model, tokenizer=tokenizer, preset=get_preset("tiny"), device=torch.device("cpu"), max_new_tokens=8
    )
    questions = read_tsv(story.storage / "benchmarks/level-2.tsv", limit=8)
    answers = generator.generate_answers(questions, 1)
    assert all(answers)
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    assert right >= 1, list(zip(answers, questions, strict=True))


def test_the_benchmarks_are_scored(story: Story) -> None:
    metrics = story.stage("evaluate")["metrics"]
    assert float(metrics["score"]) > 20
    report = story.storage / story.stage("evaluate")["output"] / "report"
    assert (report / "index.html").exists()


def test_the_columns_tell_the_story(story: Story) -> None:
    text = align(story.columns)
    assert all(f"{name} ({number}/7)" in text for number, name in enumerate(STAGES, 1))
    assert "Completed" in story.columns[-1]


def test_the_events_tell_the_story(story: Story, kubectl: Kubectl) -> None:
    described = kubectl("-n", story.namespace, "describe", "svr", "demo").stdout
    for words in ("Stage curate starts", "attempt 2 follows", "Stage evaluate succeeded", "All 7 stages succeeded"):
        assert words in described


def test_no_worker_held_a_token(story: Story, kubectl: Kubectl) -> None:
    pods = json.loads(kubectl("-n", story.namespace, "get", "pods", "-o", "json").stdout)["items"]
    assert pods
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in pods)


def files_of(story: Story, stage: dict[str, Any]) -> StageFiles:
    """The stage's files as they lie on this machine."""
    output = str(story.storage / stage["output"])
    return StageFiles(
        Stage(
            namespace=story.namespace,
            run="demo",
            stage=stage["name"],
            kind="sft",
            attempt=1,
            digest=stage["digest"],
            storage=str(story.storage),
            output=output,
            model=ModelConfig(preset="tiny"),
        )
    )


def document_of(story: Story, stage: dict[str, Any]) -> dict[str, Any]:
    """What the stage was told."""
    return decode(dict[str, Any], (story.storage / stage["output"] / "config.json").read_bytes())


def on_host(story: Story, path: str) -> Path:
    """A path in the workers on this machine."""
    return Path(str(story.storage) + path.removeprefix("/data"))
