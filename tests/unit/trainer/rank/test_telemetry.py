"""A rank's progress document and metrics."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from sailvl_trainer.contract import (
    Checkpoint,
    Progress,
)
from sailvl_trainer.rank.telemetry import Telemetry
from sailvl_trainer.storage.codec import decode, encode
from tests.support.builders.worker import build_stage


def test_progress_survives_a_restart_in_place(tmp_path: Path) -> None:
    path, stage = tmp_path / "progress.json", build_stage(tmp_path)
    first = Telemetry(stage, path)
    first.update(phase="running", step=3, steps=9, unit="samples", metrics={"loss": 2.0, "odd": float("inf")})
    with first.activity("training"):
        time.sleep(0.02)
    first.update(phase="checkpointing", checkpoint=Checkpoint(step=3, path="c"))
    first.update(phase="running", step=4)

    written = decode(Progress, path.read_bytes())
    assert (written.step, written.steps, written.unit, written.metrics) == (4, 9, "samples", {"loss": 2.0})
    second = Telemetry(stage, path).progress
    assert second == replace(written, phase="starting", time=second.time, seconds=second.seconds)
    assert second.seconds["training"] == written.seconds["training"] >= 0.02
    assert second.seconds["starting"] >= written.seconds["starting"]


def test_another_attempt_starts_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    path.write_bytes(encode(Progress(attempt=1, phase="running", step=7)))
    assert Telemetry(build_stage(tmp_path, attempt=2), path).progress.step == 0


def test_only_rank_0_sets_metrics_of_the_run(tmp_path: Path) -> None:
    stage = build_stage(tmp_path)
    labels = {"run": "demo", "stage": "curate"}
    first, other = Telemetry(stage, None, rank=0), Telemetry(stage, None, rank=1)
    for telemetry in (first, other):
        telemetry.count_samples("kept", 2)
        telemetry.update(step=5, steps=9, tokens=70, metrics={"loss": 2.0, "heldOutLoss": 1.5})
        telemetry.update(unit="questions", metrics={"colours": 0.5})
    found = first.registry.get_sample_value
    assert found("sailvl_loss", labels) == 2.0
    assert found("sailvl_tokens", labels) == 70
    assert found("sailvl_result", labels | {"metric": "heldOutLoss"}) == 1.5
    assert found("sailvl_score", labels | {"benchmark": "colours"}) == 0.5
    for telemetry in (first, other):
        assert telemetry.registry.get_sample_value("sailvl_samples_total", labels | {"outcome": "kept"}) == 2
        assert telemetry.registry.get_sample_value("sailvl_memory_bytes", labels | {"kind": "resident"})
    assert other.registry.get_sample_value("sailvl_loss", labels) is None
