"""Artifacts of an earlier attempt of curation that are damaged or forged are set aside and made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from sailvl_trainer.contract import Stage
from sailvl_trainer.curate import resume
from sailvl_trainer.curate import stage as curate_stage
from sailvl_trainer.curate.artifacts import CurationArtifacts, PlannedShard
from sailvl_trainer.rank.context import build_single_process_context
from sailvl_trainer.storage.codec import decode
from tests.support.builders.curation import build_stage, hash_shards, write_raw_folder
from tests.support.fuzz import draw_generators, mutate_bytes


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
    aside = {path.name.split(".unreadable")[0] for path in artifacts.folder.rglob("*.unreadable-*")}
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
        for path in artifacts.rows_folder.glob("*.unreadable-*"):
            path.unlink()
