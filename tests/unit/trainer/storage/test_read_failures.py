"""A document that can't be read at the moment may be intact: nothing is renamed, deleted or computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage, Result
from sailvl_trainer.errors import StorageError
from sailvl_trainer.storage import documents
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import translate_read_errors, write_atomic
from sailvl_trainer.storage.hashes import HashedFile, describe_difference, hash_file
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import (
    begin_attempt,
    check_not_superseded,
    find_newest_attempt,
    iter_checkpoints,
    lineage_path,
    read_lineage,
)
from sailvl_trainer.train.checkpoint import delete_old_checkpoints
from tests.support.builders.worker import build_stage
from tests.support.read_failures import FILE_ERRNOS, PASSING_ERRNOS, TYPICAL_ERRNOS, fail_calls, format_errno

RESULT = Result(stage="curate", kind="curate", digest="d" * 64, attempt=1, output="demo/curate")
typical_errnos = pytest.mark.parametrize("number", TYPICAL_ERRNOS, ids=format_errno)
passing_errnos = pytest.mark.parametrize("number", PASSING_ERRNOS, ids=format_errno)


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    return StageFiles(build_stage(tmp_path))


def write_checkpoint(files: StageFiles, attempt: int, step: int) -> Checkpoint:
    write_atomic(files.checkpoint_dir(attempt, step) / MANIFEST_FILE, b"{}")
    return Checkpoint(step=step, path=files.relative_path(files.checkpoint_dir(attempt, step)))


def list_files(files: StageFiles) -> list[Path]:
    return sorted(files.storage.rglob("*"))


@passing_errnos
@pytest.mark.parametrize("name", ["result.json", f"{'d' * 64}.json"], ids=["result", "pointer"])
def test_result_that_cannot_be_read_stays_and_is_a_storage_error(
    name: str, number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = files.output if name == "result.json" else files.storage / "other/curate"
    write_atomic(output / "result.json", encode(replace(RESULT, output=files.relative_path(output))))
    write_atomic(files.storage / f"results/{'d' * 64}.json", b'{"output":"other/curate"}')
    before = list_files(files)
    with monkeypatch.context() as patch:
        fail_calls(patch, "open", name, number)
        with pytest.raises(StorageError, match=f"{name} "):
            files.find_result()
    assert list_files(files) == before
    assert files.find_result() is not None


@pytest.mark.parametrize("number", FILE_ERRNOS, ids=format_errno)
def test_result_at_a_path_that_leads_to_no_file_counts_as_missing(
    number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_calls(monkeypatch, "open", "result.json", number)
    write_atomic(files.output / "result.json", b"")
    assert files.find_result() is None


def test_lack_of_memory_sets_nothing_aside(files: StageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise MemoryError

    files.write_result(RESULT)
    monkeypatch.setattr(documents, "read_data_file", fail)
    with pytest.raises(MemoryError):
        files.find_result()
    assert (files.output / "result.json").exists()


def test_error_without_errno_is_a_storage_error(tmp_path: Path) -> None:
    """Libraries raise their own, such as TimeoutError."""
    with pytest.raises(StorageError, match=r"x can't be read \(slow\)"), translate_read_errors(tmp_path / "x"):
        raise TimeoutError("slow")


@typical_errnos
@pytest.mark.parametrize(
    ("call", "name"), [("stat", "2.json"), ("open", "2.json"), ("listdir", "attempt-0001"), ("stat", MANIFEST_FILE)]
)
def test_checkpoints_of_a_chain_that_cannot_be_read_are_not_deleted(
    call: str, name: str, number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_attempt(files, 1)
    saved = write_checkpoint(files, 1, 10)
    begin_attempt(files, 2)
    before = list_files(files)
    with monkeypatch.context() as patch:
        fail_calls(patch, call, name, number)
        with pytest.raises(StorageError):
            list(iter_checkpoints(files, 2))
        with pytest.raises(StorageError):
            delete_old_checkpoints(files, 2, 1)
        with pytest.raises(StorageError):
            begin_attempt(files, 3)
    assert [path for path in list_files(files) if path != lineage_path(files, 3)] == before
    assert begin_attempt(files, 3).start == saved


@typical_errnos
def test_attempts_that_cannot_be_listed_are_a_storage_error(
    number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a superseded attempt would take itself for the newest."""
    begin_attempt(files, 1)
    fail_calls(monkeypatch, "listdir", "attempts", number)
    with pytest.raises(StorageError):
        find_newest_attempt(files)


@typical_errnos
def test_claim_that_cannot_be_seen_is_a_storage_error(
    number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_attempt(files, 1)
    fail_calls(monkeypatch, "stat", "1.json", number)
    with pytest.raises(StorageError):
        check_not_superseded(files, 1)


@pytest.mark.parametrize("content", [b"", b"{"], ids=["empty", "truncated"])
def test_attempt_without_a_usable_lineage_deletes_no_checkpoint(content: bytes, files: StageFiles) -> None:
    begin_attempt(files, 1)
    write_checkpoint(files, 1, 10)
    write_checkpoint(files, 2, 20)
    write_checkpoint(files, 2, 30)
    write_atomic(lineage_path(files, 2), content)
    before = list_files(files)
    assert delete_old_checkpoints(files, 2, 1) == []
    assert list_files(files) == before


def test_attempt_whose_chain_is_empty_deletes_only_incomplete_checkpoints(files: StageFiles) -> None:
    """A failed save may have filled the volume, so its files are deleted before the next one."""
    begin_attempt(files, 1)
    write_checkpoint(files, 1, 10)
    incomplete = files.checkpoint_dir(1, 20)
    incomplete.mkdir()
    write_atomic(lineage_path(files, 2), encode(Lineage(attempt=2, start=None)))
    assert delete_old_checkpoints(files, 2, 1) == [incomplete]
    assert [checkpoint.step for checkpoint in files.list_checkpoints(1)] == [10]


@passing_errnos
@pytest.mark.parametrize("call", ["open", "stat"])
def test_file_that_cannot_be_read_does_not_differ_from_its_manifest(
    call: str, number: int, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.storage / "x.tar"
    path.write_bytes(b"x")
    file = HashedFile(path=path, expected=hash_file(path, files.roots))
    fail_calls(monkeypatch, call, "x.tar", number)
    with pytest.raises(StorageError, match=r"x\.tar "):
        describe_difference(file, files.roots)


@typical_errnos
def test_files_below_a_link_that_cannot_be_read_are_not_outside_of_the_storage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    fail_calls(monkeypatch, "lstat", "link", number)
    with pytest.raises(StorageError, match="link "):
        StageFiles(build_stage(tmp_path / "link"))


# Files that change while they are read or replaced.


def test_good_document_written_after_a_damaged_one_was_read_stays(
    files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker reads the damaged one too, sets it aside and computes the stage in between."""
    write_atomic(files.output / "result.json", b"")
    read = documents.read_data_file

    def read_slowly(path: Path, *args: Any, **kwargs: Any) -> bytes:
        data = read(path, *args, **kwargs)
        if not data:
            documents.set_aside(path)
            files.write_result(RESULT)
        return data

    monkeypatch.setattr(documents, "read_data_file", read_slowly)
    assert files.find_result() is not None, "the pointer leads to the new result"
    assert documents.find_document(Result, files.output / "result.json", files.roots, should_set_aside=True) == RESULT
    assert len(list(files.output.glob("result.json.unusable-*"))) == 1


@pytest.mark.parametrize("seconds", [-0.5, float("-inf"), float("nan")])
def test_result_of_a_stage_whose_clock_was_set_back_can_be_read(seconds: float, files: StageFiles) -> None:
    files.write_result(replace(RESULT, seconds=seconds))
    assert files.read_result().seconds == 0.0


@pytest.mark.parametrize(
    "changes", [{"steps": -1}, {"metrics": {"m" * 300: 0.0}}, {"seconds": float("inf")}], ids=["steps", "metric", "inf"]
)
def test_result_that_could_not_be_read_again_is_not_written(changes: dict[str, Any], files: StageFiles) -> None:
    with pytest.raises(ValueError, match="the result of stage curate can't be written: it has "):
        files.write_result(replace(RESULT, **changes))
    assert not files.output.exists()


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_full_folder(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize("make", [Path.mkdir, make_full_folder, make_loop], ids=["folder", "full folder", "loop"])
def test_attempt_replaces_its_lineage_if_it_is_no_file(make: Any, files: StageFiles) -> None:
    begin_attempt(files, 1)
    start = write_checkpoint(files, 1, 10)
    make(lineage_path(files, 2))
    assert begin_attempt(files, 2) == read_lineage(files, 2) == Lineage(attempt=2, start=start)
    check_not_superseded(files, 2)
    assert len(list(files.attempts.glob("2.json.unusable-*"))) == 1
