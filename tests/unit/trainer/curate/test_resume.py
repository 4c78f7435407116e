"""Artifacts of an earlier attempt of curation that are damaged or forged are set aside and made again."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from sailvl_trainer.contract import Stage
from sailvl_trainer.curate import resume
from sailvl_trainer.curate import stage as curate_stage
from sailvl_trainer.curate.artifacts import CurationArtifacts, PlannedShard
from sailvl_trainer.errors import StorageError
from sailvl_trainer.rank.context import build_single_process_context
from sailvl_trainer.storage.codec import decode
from sailvl_trainer.storage.data_files import DataRoots, open_data_file
from sailvl_trainer.storage.files import write_atomic
from tests.support.builders.curation import build_stage, hash_shards, write_raw_folder
from tests.support.fuzz import draw_generators, mutate_bytes
from tests.support.read_failures import PASSING_ERRNOS, fail_calls, format_errno


@pytest.fixture(autouse=True)
def destroy_process_group() -> Iterator[None]:
    """Destroy the process group after every test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_stage(stage: Stage) -> None:
    curate_stage.run(build_single_process_context(stage, scratch=Path(stage.output) / "scratch"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Return a stage that has run, whose output the tests copy."""
    root = tmp_path_factory.mktemp("storage")
    write_raw_folder(root / "raw", number=12)
    stage = build_stage(root, name="finished")
    run_stage(stage)
    return stage


@pytest.fixture
def output(finished: Stage, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.output, tmp_path / "output"))


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


def rewrite_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def replace_column(name: str, values: Callable[[pa.ChunkedArray], pa.Array]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        rewrite_table(
            path, lambda table: table.set_column(table.schema.get_field_index(name), name, values(table[name]))
        )

    return replace


def name_as_volume_error(column: pa.ChunkedArray) -> pa.Array:
    return pa.StructArray.from_arrays([column.combine_chunks()], names=["errno 5"])


DAMAGES: list[object] = [
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: os.truncate(path, path.stat().st_size // 2), id="truncated"),
    pytest.param(lambda path: path.write_bytes(bytes(path.stat().st_size)), id="zeros"),
    pytest.param(make_pipe, id="pipe"),
]
TABLE_DAMAGES: list[object] = [
    *DAMAGES,
    pytest.param(lambda path: rewrite_table(path, lambda table: table.drop_columns(["path"])), id="without a column"),
    pytest.param(replace_column("offset", lambda c: c.cast(pa.float64())), id="column of another type"),
    pytest.param(replace_column("offset", name_as_volume_error), id="column type named as an error of the volume"),
    pytest.param(replace_column("offset", lambda c: pa.repeat(pa.scalar(-5, c.type), len(c))), id="negative offset"),
    pytest.param(replace_column("key", lambda c: pa.nulls(len(c), c.type)), id="empty cells"),
]


@pytest.mark.parametrize("damage", TABLE_DAMAGES)
def test_unusable_item_list_is_set_aside(damage: Callable[[Path], None], output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    assert resume.has_items(artifacts, 0)
    damage(artifacts.items_file(0))
    assert not resume.has_items(artifacts, 0)
    assert not artifacts.items_file(0).exists()


@pytest.mark.parametrize(
    "damage",
    [
        *TABLE_DAMAGES,
        pytest.param(flip_bits, id="flipped bits"),
        pytest.param(lambda path: rewrite_table(path, lambda table: table.slice(1)), id="row missing"),
        pytest.param(replace_column("item", lambda c: pa.repeat(c[0], len(c))), id="items of another unit"),
    ],
)
def test_unusable_verified_items_are_set_aside(damage: Callable[[Path], None], output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    assert resume.has_rows(artifacts, 0)
    damage(artifacts.rows_file(0))
    assert not resume.has_rows(artifacts, 0)


class FailingFile(io.FileIO):
    """A file that can be opened, but not read."""

    error: BaseException

    def read(self, *_: object) -> bytes:
        raise self.error

    readinto = read  # type: ignore[assignment]


READ_ERRORS = [
    pytest.param(OSError(errno.ETIMEDOUT, "timed out"), StorageError, id="timeout"),
    pytest.param(OSError(errno.EIO, "io"), StorageError, id="unavailable volume"),
    pytest.param(MemoryError(), MemoryError, id="lack of memory"),
    pytest.param(pa.lib.ArrowMemoryError("malloc of size 64 failed"), MemoryError, id="lack of memory in Arrow"),
]


@pytest.mark.parametrize(("error", "raised"), READ_ERRORS)
def test_table_whose_content_cannot_be_read_stays(
    error: BaseException, raised: type[Exception], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_failing(path: Path, roots: DataRoots) -> FailingFile:
        file = FailingFile(path)
        file.error = error
        return file

    artifacts = CurationArtifacts(output / "artifacts")
    monkeypatch.setattr(resume, "open_data_file", open_failing)
    with pytest.raises(raised):
        resume.has_rows(artifacts, 0)
    assert artifacts.rows_file(0).exists()


@pytest.mark.parametrize("number", PASSING_ERRNOS, ids=format_errno)
def test_artifact_that_cannot_be_opened_stays(number: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    shard = decode(list[PlannedShard], artifacts.shards.read_bytes())[0]
    checks: list[tuple[str, Path, Callable[[], bool]]] = [
        ("open", artifacts.rows_file(0), lambda: resume.has_rows(artifacts, 0)),
        ("open", artifacts.plan, lambda: resume.has_selection(artifacts)),
        ("open", artifacts.shards, lambda: resume.has_selection(artifacts)),
        ("stat", output / shard.split / f"{shard.name}.tar", lambda: resume.has_shard(artifacts, output, shard)),
    ]
    before = sorted(output.rglob("*"))
    for call, path, check in checks:
        with monkeypatch.context() as patch:
            fail_calls(patch, call, path.name, number)
            with pytest.raises(StorageError):
                check()
    assert sorted(output.rglob("*")) == before


def test_good_table_written_after_a_damaged_one_was_read_stays(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    path = artifacts.rows_file(0)
    content = path.read_bytes()
    os.truncate(path, 99)

    def open_before_another_writes(path: Path, roots: DataRoots) -> BinaryIO:
        file = open_data_file(path, roots)
        write_atomic(path, content)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(resume, "open_data_file", open_before_another_writes)
        assert not resume.has_rows(artifacts, 0)
    assert resume.has_rows(artifacts, 0)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["plan.parquet", "decisions.parquet", "shards.json"])
def test_unusable_selection_is_made_again(damage: Callable[[Path], None], name: str, output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    assert resume.has_selection(artifacts)
    damage(artifacts.folder / name)
    assert not resume.has_selection(artifacts)


def test_plan_of_another_number_of_samples_is_set_aside(output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    rewrite_table(artifacts.plan, lambda table: table.slice(1))
    assert not resume.has_selection(artifacts)


SHARD_DAMAGES: list[object] = [
    *DAMAGES,
    pytest.param(lambda path: path.write_bytes(path.read_bytes().replace(b'"samples":', b'"samples":1')), id="count"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes().replace(b"00000", b"../00")), id="name"),
]


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_shard_with_unusable_info_is_written_again(damage: Callable[[Path], None], output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    shard = decode(list[PlannedShard], artifacts.shards.read_bytes())[0]
    assert resume.has_shard(artifacts, output, shard)
    damage(artifacts.shard_info_file(shard))
    assert not resume.has_shard(artifacts, output, shard)


@pytest.mark.parametrize("suffix", [".tar", ".arrow"])
def test_truncated_shard_is_written_again(suffix: str, output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    shard = decode(list[PlannedShard], artifacts.shards.read_bytes())[0]
    os.truncate(output / shard.split / f"{shard.name}{suffix}", 99)
    assert not resume.has_shard(artifacts, output, shard)


@pytest.mark.slow
def test_attempt_with_damaged_artifacts_writes_the_same_shards(finished: Stage) -> None:
    stage = build_stage(Path(finished.storage), name="damaged")
    shutil.copytree(finished.output, stage.output)
    artifacts = CurationArtifacts(Path(stage.output) / "artifacts")
    damaged = [artifacts.partitions_file, artifacts.items_file(0), artifacts.rows_file(0), artifacts.plan]
    damaged += [artifacts.folder / "shards/00000.json"]
    for path in damaged:
        os.truncate(path, path.stat().st_size // 2)
    run_stage(stage)
    assert hash_shards(stage) == hash_shards(finished)
    aside = {path.name.split(".unusable")[0] for path in artifacts.folder.rglob("*.unusable-*")}
    assert aside == {path.name for path in damaged}


@pytest.mark.fuzz
def test_any_change_of_an_artifact_is_used_or_set_aside(output: Path) -> None:
    artifacts = CurationArtifacts(output / "artifacts")
    content = artifacts.rows_file(0).read_bytes()
    for generator in draw_generators(100):
        artifacts.rows_file(0).write_bytes(mutate_bytes(content, generator))
        try:
            resume.has_rows(artifacts, 0)
        except BaseException as error:
            error.add_note(f"repeat with SAILVL_FUZZ_SEED={generator.number}")  # type: ignore[attr-defined]
            raise
        for path in artifacts.rows_folder.glob("*.unusable-*"):
            path.unlink()
