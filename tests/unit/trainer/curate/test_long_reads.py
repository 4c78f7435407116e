"""Tests of sources that take long to read: their bytes are bounded, and a stop request ends the reading at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sailvl_trainer.contract import CurateConfig, SourceConfig
from sailvl_trainer.curate import image_folder
from sailvl_trainer.curate import stage as curate_stage
from sailvl_trainer.curate.artifacts import CurationArtifacts, write_items
from sailvl_trainer.curate.items import Item
from sailvl_trainer.curate.resume import has_items
from sailvl_trainer.curate.sources import list_items, list_partitions, resolve_roots
from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank import distributed_tasks
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.rank.distributed_tasks import TaskPool
from tests.support.builders.curation import build_stage, build_tar


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a source with one image."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    return folder


def list_source(path: Path, form: str, on_progress: Callable[[], None] = lambda: None) -> list[Item]:
    sources = (SourceConfig(path=str(path), format=form),)  # type: ignore[arg-type]
    roots = resolve_roots(sources, str(path))
    return [part for found in list_partitions(sources, 0) for part in list_items(found, roots, on_progress)]


def write_sparse(path: Path, *, begin: bytes, size: int) -> None:
    """Write a file that begins with the given bytes and has zeros up to its size, which take no place."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


UNBOUNDED_FILES = [
    pytest.param(b"", 400 << 30, "larger than 16.0 GiB; divide it", id="sparse file of hundreds of GiB"),
    pytest.param(b"{}\n", 15 << 30, "line 2 is longer than 64.0 MiB; the rest is not read", id="line without an end"),
]


@pytest.mark.parametrize(("begin", "size", "detail"), UNBOUNDED_FILES)
def test_caption_file_without_bounds_is_counted_and_not_read(
    source: Path, begin: bytes, size: int, detail: str
) -> None:
    write_sparse(source / "captions.jsonl", begin=begin, size=size)
    calls: list[int] = []
    items = list_source(source, "imagefolder", lambda: calls.append(1))
    assert [(item.key, item.problem) for item in items if item.problem != "invalid_record"] == [
        ("a", ""),
        ("captions-jsonl", "too_large"),
    ]
    assert items[-1].detail == f"captions.jsonl: {detail}"
    assert len(calls) < 200


def test_growing_caption_file_is_read_up_to_the_limit(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MAX_CAPTION_FILE_BYTES", 10_000)
    path = source / "captions.jsonl"
    path.write_bytes(b"\n" * 1000)

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"\n" * 1000)
        assert path.stat().st_size < 10 << 20, "the file is read without a limit"

    items = list_source(source, "imagefolder", grow)
    assert (items[-1].problem, items[-1].detail[:40]) == ("too_large", "captions.jsonl: larger than 9.8 KiB; div")


def write_long_line(source: Path) -> str:
    (source / "captions.jsonl").write_bytes(b"x" * (8 << 20))
    return "imagefolder"


def write_empty_lines(source: Path) -> str:
    (source / "captions.jsonl").write_bytes(b"\n" * 1000)
    return "imagefolder"


def write_many_files(source: Path) -> str:
    for number in range(50):
        (source / f"{number}.log").touch()
    return "imagefolder"


def write_tar_without_images(source: Path) -> str:
    build_tar(source / "a.tar", {f"{number}.log": b"" for number in range(50)})
    return "webdataset"


LONG_SOURCES = [write_long_line, write_empty_lines, write_many_files, write_tar_without_images]


@pytest.mark.parametrize("write", LONG_SOURCES)
def test_reading_that_yields_nothing_reports_progress_and_can_be_ended(
    source: Path, write: Callable[[Path], str]
) -> None:
    class StoppedError(Exception):
        pass

    calls: list[int] = []

    def stop_at_the_eighth_call() -> None:
        calls.append(1)
        if len(calls) == 8:
            raise StoppedError

    form = write(source)
    with pytest.raises(StoppedError):
        list_source(source, form, stop_at_the_eighth_call)


@pytest.fixture
def context(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Return the context of a stage that is asked to stop with its third heartbeat."""
    monkeypatch.setattr(distributed_tasks, "ACTIVITY_SECONDS", 0.0)
    stage = build_stage(tmp_path)
    context = build_single_process_context(stage, scratch=tmp_path / "scratch")
    heartbeats: list[int] = []

    def send_heartbeat(**_: object) -> None:
        heartbeats.append(1)
        if len(heartbeats) == 3:
            (tmp_path / "scratch" / "stop").touch()
        assert len(heartbeats) < 10, "the stage continues"

    monkeypatch.setattr(context.telemetry, "update", send_heartbeat)
    return context


def test_stop_request_ends_the_listing_of_a_source_in_the_middle(source: Path, context: Context) -> None:
    write_empty_lines(source)
    sources = (SourceConfig(path=str(source), format="imagefolder"),)
    artifacts, pool = CurationArtifacts(context.files.output / "artifacts"), TaskPool(context)
    curate_stage.list_partitions(context, pool, artifacts, CurateConfig(sources=sources))
    with pytest.raises(Preempted):
        curate_stage.list_items(pool, artifacts, resolve_roots(sources, str(source)))
    assert not list(artifacts.folder.glob("items/*"))


def test_item_list_with_more_rows_than_its_bytes_allow_is_not_read(context: Context) -> None:
    artifacts = CurationArtifacts(context.files.output / "artifacts")
    path = artifacts.items_file(0)
    write_items(path, [Item(source="s", key="a")] * 10)
    assert has_items(artifacts, 0)
    table = pq.read_table(path).take(pa.array(np.zeros(200_000, np.int64)))
    pq.write_table(table, path, row_group_size=len(table), compression="zstd")
    assert path.stat().st_size < 100_000
    assert not has_items(artifacts, 0)


def test_stop_request_ends_the_check_of_an_earlier_item_list_in_the_middle(context: Context) -> None:
    artifacts, pool = CurationArtifacts(context.files.output / "artifacts"), TaskPool(context)
    write_items(artifacts.items_file(0), [Item(source="s", key="a")] * 2000)
    with pytest.raises(Preempted):
        pool.run("listing", 1, lambda number: has_items(artifacts, number, pool.report_activity), pytest.fail)
