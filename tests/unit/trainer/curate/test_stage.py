"""Tests of the whole curate stage: its outputs, equal bytes for any number of ranks, resuming and stopping."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sailvl_trainer.contract import Result, Stage
from sailvl_trainer.curate import selection
from sailvl_trainer.curate import stage as subject
from sailvl_trainer.data.shards import ShardReader
from sailvl_trainer.errors import ConfigError, DataError, Preempted
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.storage.shard_manifest import read_shard_manifest
from tests.support.builders.curation import build_stage, hash_shards, write_raw_folder
from tests.support.builders.training import start_ranks

RANK = Path(__file__).parents[3] / "support/ranks/curate.py"


@pytest.fixture(autouse=True)
def destroy_process_group() -> Iterator[None]:
    """Destroy the process group after every test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_stage(stage: Stage) -> tuple[Result, Context]:
    context = build_single_process_context(stage, scratch=Path(stage.output) / "scratch")
    return subject.run(context), context


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("storage")
    write_raw_folder(directory / "raw")
    return directory


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[Stage, Result, Context]:
    stage = build_stage(root, name="finished")
    found = run_stage(stage)
    dist.destroy_process_group()
    return (stage, *found)


def test_result_counts_all_items(finished: tuple[Stage, Result, Context]) -> None:
    _, result, context = finished
    metrics = dict(result.metrics)
    assert metrics.pop("heldOut") > 0
    assert metrics.pop("nearDuplicate") + metrics.pop("kept") == 61
    assert metrics.pop("dropped") == 65 - result.samples
    assert metrics.pop("duplicates") == 1 + result.metrics["nearDuplicate"]
    assert metrics == {"duplicate": 1, "invalidImage": 2, "noCaption": 1}
    assert (result.steps, result.samples) == (65, result.metrics["kept"])
    assert (result.kind, result.output, result.digest) == ("curate", "demo/finished", "finished")
    progress = context.telemetry.progress
    assert (progress.step, progress.steps, progress.unit, progress.samples) == (65, 65, "samples", 65)
    assert {"listing", "verifying", "deciding", "writing", "reporting"} <= set(progress.seconds)


def test_shards_hold_the_kept_samples(root: Path, finished: tuple[Stage, Result, Context]) -> None:
    stage, result, _ = finished
    splits: dict[str, list[str]] = {}
    for split in ("shards", "held-out"):
        folder = Path(stage.output) / split
        manifest = read_shard_manifest(folder)
        readers = [ShardReader(folder, shard.name) for shard in manifest.shards]
        samples = [reader.sample(row) for reader in readers for row in range(len(reader))]
        assert manifest.samples == len(samples)
        assert all(shard.samples <= 16 for shard in manifest.shards)
        splits[split] = [sample.key for sample in samples]
        for sample in samples:
            _, _, name = sample.key.partition("-")
            if sample.meta["source"] == "raw":
                assert sample.image == next((root / "raw").glob(f"{name}.[pj][nop]g")).read_bytes()
                assert sample.meta["caption"] == (root / "raw" / f"{name}.txt").read_text()
            assert sample.messages[1].content == sample.meta["caption"]
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert splits["shards"] == sorted(splits["shards"])
    assert not set(splits["shards"]) & set(splits["held-out"])
    assert len(splits["held-out"]) == result.metrics["heldOut"]
    assert len(splits["shards"]) + len(splits["held-out"]) == result.samples


def test_held_out_images_do_not_depend_on_the_order_of_sources(
    root: Path, finished: tuple[Stage, Result, Context]
) -> None:
    def hash_held_out(stage: Stage) -> set[str]:
        reader = ShardReader(Path(stage.output) / "held-out", "00000")
        return {hashlib.sha256(reader.image(row) or b"").hexdigest() for row in range(len(reader))}

    stage = finished[0]
    assert stage.curate is not None
    reversed_ = replace(
        build_stage(root, name="reversed"), curate=replace(stage.curate, sources=stage.curate.sources[::-1])
    )
    run_stage(reversed_)
    assert hash_held_out(reversed_) == hash_held_out(stage)


def test_report_is_self_contained_and_complete(finished: tuple[Stage, Result, Context]) -> None:
    stage, result, _ = finished
    report = Path(stage.output) / "report"
    page = (report / "index.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<script|@import|url\(", page)
    for label in ("image cannot be decoded", "no caption", "identical pixels", "near duplicate"):
        assert label in page
    assert page.count("data:image/png") == 4
    facts = json.loads((report / "report.json").read_bytes())
    assert facts["items"] == 65
    assert sum(facts["outcomes"].values()) == 65
    assert [source["name"] for source in facts["sources"]] == ["raw", "drawn"]
    assert sum(source["items"] for source in facts["sources"]) == 65
    for histogram in ("word_count", "longer_side", "aspect_ratio", "tiles"):
        assert sum(number for _, number in facts[histogram]) == result.samples
    assert facts["unigrams"]["total"] - facts["bigrams"]["total"] == result.samples
    assert facts["tiles"] == [[1.0, result.samples]]


def test_second_run_writes_the_same_bytes(root: Path, finished: tuple[Stage, Result, Context]) -> None:
    again = build_stage(root, name="again")
    run_stage(again)
    assert hash_shards(again) == hash_shards(finished[0])


@pytest.mark.parametrize(
    "after",
    [
        "list_items",
        *(pytest.param(step, marks=pytest.mark.slow) for step in ("verify_items", "select_samples", "write_shards")),
        "write_manifests",
    ],
)
def test_killed_attempt_is_resumed_after_each_step(
    root: Path,
    finished: tuple[Stage, Result, Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: str,
) -> None:
    killed = replace(build_stage(root, name="killed"), output=str(root / "demo" / f"killed-{after}"))
    original = getattr(subject, after)

    def run_and_end(*args: Any) -> None:
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subject, after, run_and_end)
        with pytest.raises(KeyboardInterrupt):
            run_stage(killed)
    dist.destroy_process_group()
    before = {p: p.stat().st_mtime_ns for p in (Path(killed.output) / "artifacts").rglob("*.parquet")}
    result, _ = run_stage(replace(killed, attempt=2))
    assert hash_shards(killed) == hash_shards(finished[0])
    assert result.metrics == finished[1].metrics
    assert {p: p.stat().st_mtime_ns for p in before} == before, "completed work is not repeated"


def test_only_missing_artifacts_are_written_again(root: Path, finished: tuple[Stage, Result, Context]) -> None:
    stage = replace(build_stage(root, name="holes"), digest="holes")
    shutil.copytree(finished[0].output, stage.output)
    artifacts = Path(stage.output) / "artifacts"
    for path in (artifacts / "rows" / "000001.parquet", artifacts / "shards" / "00001.json"):
        path.unlink()
    (Path(stage.output) / "shards" / ".00001.tar.77").write_bytes(b"half")
    times = {p: p.stat().st_mtime_ns for p in artifacts.rglob("*") if p.is_file()}
    run_stage(stage)
    assert hash_shards(stage) == hash_shards(finished[0])
    assert {p: p.stat().st_mtime_ns for p in times} == times


STOP_POINTS = [
    pytest.param("write_verified_items", 1, id="verifying"),
    pytest.param("select_samples", 2, id="deciding"),
    pytest.param("build_caption_sample", 2, id="writing"),
]


@pytest.mark.parametrize(("name", "rows"), STOP_POINTS)
def test_stop_finishes_the_current_task_and_keeps_its_result(
    name: str,
    rows: int,
    *,
    root: Path,
    finished: tuple[Stage, Result, Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = build_stage(root, name=f"stop-{name}")
    stop, original = Path(stage.output) / "scratch" / "stop", getattr(subject, name)

    def stop_and_run(*args: Any) -> Any:
        stop.touch()
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(subject, name, stop_and_run)
        with pytest.raises(Preempted, match="completed tasks are kept"):
            run_stage(stage)
    assert len(list((Path(stage.output) / "artifacts" / "rows").glob("*.parquet"))) == rows
    dist.destroy_process_group()
    stop.unlink()
    run_stage(replace(stage, attempt=2))
    assert hash_shards(stage) == hash_shards(finished[0])


def test_error_counts_outcomes_if_all_images_were_dropped(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"all images were dropped.*too_small"):
        run_stage(build_stage(root, name="none", min_side=5000))


def test_image_deleted_after_verification_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw_folder(tmp_path / "raw", number=4)
    original = selection.select_samples

    def delete_and_select(*args: Any) -> dict[str, int]:
        (tmp_path / "raw" / "002.png").unlink()
        return original(*args)

    monkeypatch.setattr(subject, "select_samples", delete_and_select)
    with pytest.raises(DataError, match="raw: 002 was verified but can't be read any more"):
        run_stage(build_stage(tmp_path))


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(root: Path, finished: tuple[Stage, Result, Context], tmp_path: Path) -> None:
    stage, scratch = build_stage(root, name="two"), tmp_path / "scratch"
    ranks = start_ranks(RANK, stage, 2, scratch)
    assert [rank.wait(120) for rank in ranks] == [0, 0], (scratch / "log-0").read_text()[-2000:]
    results = [json.loads((scratch / f"result-{rank}.json").read_bytes()) for rank in range(2)]
    assert [result["samples"] for result in results] == [finished[1].samples] * 2
    assert hash_shards(stage) == hash_shards(finished[0])
