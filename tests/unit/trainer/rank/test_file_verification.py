"""Files of other runs are compared with their manifests before use: once, by all ranks, and again if they change."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import ModelConfig, Result
from sailvl_trainer.data.encoder import SampleEncoder
from sailvl_trainer.data.shards import ShardReader, ShardWriter
from sailvl_trainer.data.synthetic import draw_question
from sailvl_trainer.errors import DataError, Preempted, StorageError
from sailvl_trainer.model.presets import get_preset
from sailvl_trainer.model.tokenizer import load_tokenizer
from sailvl_trainer.rank import distributed_tasks
from sailvl_trainer.rank.context import Context, build_single_process_context
from sailvl_trainer.rank.file_verification import describe_damage, verify_input
from sailvl_trainer.rank.reused_result import find_result_or_claim
from sailvl_trainer.storage import verified_files
from sailvl_trainer.storage.export_manifest import write_export_manifest
from sailvl_trainer.storage.hashes import FileHash, HashedFile
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import find_newest_attempt
from sailvl_trainer.storage.shard_manifest import list_shard_files, write_shard_manifest
from sailvl_trainer.train.dataset_cache import open_dataset
from tests.support.builders.training import build_stage
from tests.support.read_failures import TYPICAL_ERRNOS, fail_calls, format_errno

SHARDS = 3


def build_shards(directory: Path) -> list[HashedFile]:
    """Write a split of three shards of one sample each, and return its files."""
    infos = []
    for number in range(SHARDS):
        with ShardWriter(directory, f"{number:05d}") as writer:
            writer.write(draw_question(0, number, 1))
        assert writer.info is not None
        infos.append(writer.info)
    return list_shard_files(directory, write_shard_manifest(directory, infos))


@pytest.fixture
def files(tmp_path: Path) -> list[HashedFile]:
    return build_shards(tmp_path / "set/shards")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return build_single_process_context(build_stage(tmp_path), scratch=tmp_path / "scratch")


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    tokenizer = load_tokenizer(ModelConfig(preset="tiny"))
    return SampleEncoder(tokenizer=tokenizer, preset=get_preset("tiny"), max_tiles=1, pack_tokens=256)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files that are read."""
    names: list[str] = []
    describe = verified_files.describe_difference

    def describe_and_note(file: HashedFile, *arguments: object) -> str:
        names.append(file.path.name)
        return describe(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(verified_files, "describe_difference", describe_and_note)
    return names


def describe(context: Context, files: Sequence[HashedFile]) -> str:
    return describe_damage(context, files, context.files.roots)


def flip_bit(path: Path) -> None:
    """Change the content alone: the size stays, and the time of modification is that of now."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verified_files_are_read_once_per_run(context: Context, files: list[HashedFile], hashed: list[str]) -> None:
    assert describe(context, files) == ""
    assert sorted(hashed) == sorted(file.path.name for file in files)
    hashed.clear()
    assert describe(context, files) == ""
    stage = replace(context.stage, attempt=2, stage="other", output=str(context.files.run / "other"))
    other_stage = replace(context, stage=stage, files=StageFiles(stage))
    assert describe(other_stage, files) == "", "the run's other stages use the record too"
    assert hashed == []
    other_run = StageFiles(replace(stage, output=str(context.files.storage / "run2/other")))
    assert describe(replace(context, files=other_run), files) == ""
    assert len(hashed) == len(files), "another run's record isn't believed"


def test_record_in_the_set_itself_is_not_believed(context: Context, files: list[HashedFile], hashed: list[str]) -> None:
    describe(context, files)
    hashed.clear()
    os.rename(context.files.verified, files[0].path.parent / "verified")
    describe(context, files)
    assert len(hashed) == len(files)


def test_changed_file_is_read_again(context: Context, files: list[HashedFile], hashed: list[str]) -> None:
    describe(context, files)
    hashed.clear()
    flip_bit(files[2].path)
    assert describe(context, files).startswith(f"{files[2].path}: it has ")
    assert hashed == [files[2].path.name]


def test_interrupted_verification_continues_with_the_other_files(
    context: Context, files: list[HashedFile], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, update = context.files.storage / "scratch/stop", context.telemetry.update
    monkeypatch.setattr(context.telemetry, "update", lambda **changes: (len(hashed) == 2 and stop.touch(), update()))
    with pytest.raises(Preempted):
        describe(context, files)
    assert len(hashed) == 2
    stop.unlink()
    monkeypatch.setattr(context.telemetry, "update", update)
    assert describe(context, files) == ""
    assert sorted(hashed) == sorted(file.path.name for file in files), "none of them twice"


def test_stop_request_is_obeyed_in_the_middle_of_a_file(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_tasks, "ACTIVITY_SECONDS", 0.0)
    path, heartbeats = context.files.storage / "large.tar", []
    with path.open("wb") as file:
        file.truncate(64 << 20)

    def request_stop_at_the_third_heartbeat(**_: object) -> None:
        heartbeats.append(1)
        if len(heartbeats) == 3:
            (context.files.storage / "scratch/stop").touch()
        assert len(heartbeats) < 10, "the file is read on"

    monkeypatch.setattr(context.telemetry, "update", request_stop_at_the_third_heartbeat)
    with pytest.raises(Preempted):
        describe(context, [HashedFile(path=path, expected=FileHash(bytes=64 << 20, sha256="0" * 64))])


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\n", b"[" * 70_000, b"{}\n"], ids=["cut off", "no UTF-8", "deep", "empty"]
)
def test_record_that_cannot_be_read_is_left_out(
    line: bytes, context: Context, files: list[HashedFile], hashed: list[str]
) -> None:
    context.files.verified.mkdir(parents=True)
    (context.files.verified / "a.jsonl").write_bytes(line)
    os.mkfifo(context.files.verified / "b.jsonl")
    assert describe(context, files) == ""
    assert len(hashed) == len(files)


def cut_off(path: Path) -> None:
    os.truncate(path, 99)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_endless_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES: list[Callable[[Path], None]] = [flip_bit, cut_off, Path.unlink, replace_by_pipe, replace_by_endless_device]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("number", [0, 3], ids=["tar", "index"])
def test_damaged_set_is_a_data_error_before_training(
    damage: Callable[[Path], None], number: int, context: Context, files: list[HashedFile], encoder: SampleEncoder
) -> None:
    damage(files[number].path)
    with pytest.raises(DataError, match=rf"{files[number].path}: .*; copy or curate the data set again"):
        open_dataset(context, [files[0].path.parent.parent], "shards", encoder)


@pytest.mark.parametrize("number", TYPICAL_ERRNOS, ids=format_errno)
@pytest.mark.parametrize("failing", [("open", "00001.tar"), ("stat", "00001.tar"), ("open", "manifest.json")])
def test_set_that_cannot_be_read_is_a_storage_error(
    failing: tuple[str, str], number: int, context: Context, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a damaged set, it needs no other copy, so the stage is tried again."""
    folder = context.files.storage / "set"
    build_shards(folder / "shards")
    fail_calls(monkeypatch, *failing, number)
    with pytest.raises(StorageError, match=rf"{failing[1]} "):
        open_dataset(context, [folder], "shards", encoder)


@pytest.mark.parametrize("number", TYPICAL_ERRNOS, ids=format_errno)
@pytest.mark.parametrize("file", ["00001.tar", "00001.arrow"])
def test_shard_that_cannot_be_opened_is_a_storage_error(
    file: str, number: int, files: list[HashedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_calls(monkeypatch, "open", file, number)
    with pytest.raises(StorageError, match=rf"{file} "):
        ShardReader(files[0].path.parent, "00001")


def test_files_of_this_run_are_not_read(context: Context, hashed: list[str]) -> None:
    verify_input(context, build_shards(context.files.run / "curate/shards"), advice="")
    assert hashed == []


# Results of other runs.


def build_export(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    write_export_manifest(folder)


@pytest.fixture
def other(context: Context) -> StageFiles:
    """Return the output of another run's stage with the same digest, which has a result and an export."""
    stage = replace(context.stage, run="other", output=str(context.files.storage / "other/knowledge"))
    files = StageFiles(stage)
    build_export(files.export)
    files.write_result(
        Result(stage="knowledge", kind="sft", digest=stage.digest, attempt=1, output="other/knowledge")
    )  # fmt: skip
    return files


def test_intact_result_of_another_run_is_reused(context: Context, other: StageFiles) -> None:
    found = find_result_or_claim(context)
    assert found is not None
    assert (found.output, found.reused) == ("other/knowledge", True)
    assert find_newest_attempt(context.files) == 0
    assert context.files.read_result() == found


def test_damaged_result_of_another_run_is_computed_again(context: Context, other: StageFiles) -> None:
    flip_bit(other.export / "model.safetensors")
    assert find_result_or_claim(context) is None
    assert find_newest_attempt(context.files) == 1, "the stage is claimed"


def test_result_of_another_run_without_manifest_is_computed_again(context: Context, other: StageFiles) -> None:
    (other.export / "manifest.json").unlink()
    assert find_result_or_claim(context) is None


def test_own_result_is_reused_without_reading_its_files(context: Context, hashed: list[str]) -> None:
    result = Result(
        stage="knowledge", kind="sft", digest=context.stage.digest, attempt=1, output="demo/knowledge"
    )  # fmt: skip
    context.files.write_result(result)
    assert find_result_or_claim(context) == replace(result, reused=True)
    assert hashed == []
