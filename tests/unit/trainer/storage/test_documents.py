"""Documents on the storage that are damaged or forged count as missing, are kept beside it, and end no stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sailvl_trainer.contract import MANIFEST_FILE, Checkpoint, Lineage, NonFinite, Result, ResultPointer, Skip
from sailvl_trainer.errors import ConfigError, Preempted, StorageError
from sailvl_trainer.storage import documents
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.documents import UnusableDocumentError, find_document, iterate_lines, resolve_below
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import (
    begin_attempt,
    check_not_superseded,
    claim_stage,
    find_newest_attempt,
    iter_checkpoints,
    lineage_path,
    non_finite_path,
    read_lineage,
    read_non_finite,
)
from sailvl_trainer.storage.shard_manifest import ShardInfo, read_shard_manifest, write_shard_manifest
from tests.support.builders.worker import build_stage

DIGEST = "d" * 64
OWN = "demo/curate"
RESULT = Result(stage="curate", kind="curate", digest=DIGEST, attempt=1, output=OWN, metrics={"kept": 2.0})


@pytest.fixture
def files(tmp_path: Path) -> StageFiles:
    return StageFiles(build_stage(tmp_path))


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_directory(path: Path) -> None:
    path.mkdir()


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


DAMAGES: list[object] = [
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: path.write_bytes(b'{"schema_version":1,"sta'), id="truncated"),
    pytest.param(lambda path: path.write_bytes(bytes(512)), id="zeros"),
    pytest.param(lambda path: path.write_bytes(b"[]"), id="another type"),
    pytest.param(lambda path: path.write_bytes(b"{}"), id="without fields"),
    pytest.param(lambda path: path.write_bytes(b'{"x":' * 100_000), id="nested too deeply"),
    pytest.param(lambda path: path.write_bytes(b'{"\xff":1}'), id="no UTF-8"),
    pytest.param(lambda path: path.write_bytes(b'{"schema_version":99}'), id="another version"),
    pytest.param(make_huge, id="huge"),
    pytest.param(make_pipe, id="pipe"),
    pytest.param(make_endless, id="endless device"),
    pytest.param(make_directory, id="directory"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_result_is_set_aside(damage: Callable[[Path], None], files: StageFiles) -> None:
    files.output.mkdir(parents=True)
    damage(files.output / "result.json")
    assert files.find_result() is None
    assert [path.name.split("-")[0] for path in files.output.iterdir()] == ["result.json.unusable"]
    files.write_result(RESULT)
    assert files.find_result() == replace(RESULT, reused=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_result_pointer_is_set_aside(damage: Callable[[Path], None], files: StageFiles) -> None:
    folder = files.storage / "results"
    folder.mkdir()
    damage(folder / f"{DIGEST}.json")
    assert files.find_result() is None
    assert [path.name.split("-")[0] for path in folder.iterdir()] == [f"{DIGEST}.json.unusable"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_result_of_another_run_is_not_changed(damage: Callable[[Path], None], files: StageFiles) -> None:
    write_pointer(files, "other/curate")
    (files.storage / "other/curate").mkdir(parents=True)
    damage(files.storage / "other/curate/result.json")
    assert files.find_result() is None
    assert [path.name for path in (files.storage / "other/curate").iterdir()] == ["result.json"]


def write_pointer(files: StageFiles, output: str) -> None:
    write_atomic(files.storage / f"results/{DIGEST}.json", encode(ResultPointer(output=output)))


LEAVING = ["../x", "x/../../x", "/etc", "", "link/x", "x\0", "a" * 5000, "x/" + "../" * 9 + "etc"]


@pytest.mark.parametrize("output", LEAVING)
def test_pointer_that_leaves_the_storage_is_not_followed(output: str, tmp_path: Path) -> None:
    files, outside = StageFiles(build_stage(tmp_path / "storage")), tmp_path / "x"
    for folder in (outside, outside / "x"):
        write_atomic(folder / "result.json", encode(replace(RESULT, output=output)))
    files.storage.mkdir()
    (files.storage / "link").symlink_to(outside)
    write_pointer(files, output)
    assert files.find_result() is None
    with pytest.raises(UnusableDocumentError):
        resolve_below(files.storage, output)


INVALID_RESULTS = [
    pytest.param({"output": "../../etc"}, id="output outside of the storage"),
    pytest.param({"output": "demo/other"}, id="output of another stage"),
    pytest.param({"steps": -1}, id="negative steps"),
    pytest.param({"tokens": 2**63}, id="more tokens than int64 holds"),
    pytest.param({"metrics": {f"m{i}": 0.0 for i in range(2000)}}, id="too many metrics"),
    pytest.param({"metrics": {"m" * 300: 0.0}}, id="long name of a metric"),
    pytest.param({"kind": "train"}, id="unknown kind"),
]


@pytest.mark.parametrize("changes", INVALID_RESULTS)
def test_result_with_impossible_values_is_not_used(changes: dict[str, object], files: StageFiles) -> None:
    write_atomic(files.output / "result.json", encode(replace(RESULT, **changes)))
    assert files.find_result() is None
    with pytest.raises(FileNotFoundError):
        files.read_result()


def test_result_in_another_output_is_not_own(files: StageFiles) -> None:
    other = StageFiles(build_stage(files.storage, run="other"))
    other.write_result(replace(RESULT, output="other/curate"))
    found = files.find_result()
    assert found is not None
    assert not files.is_own(found)
    assert other.is_own(found)


def test_document_on_an_unavailable_volume_is_a_storage_error(
    files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computing the stage again wouldn't help, and setting the document aside would lose it."""

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(documents, "read_data_file", fail)
    with pytest.raises(StorageError):
        files.find_result()


def test_document_on_a_read_only_volume_stays_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(documents.os, "rename", fail)
    (tmp_path / "x.json").write_bytes(b"{")
    roots = StageFiles(build_stage(tmp_path)).roots
    assert find_document(Result, tmp_path / "x.json", roots, should_set_aside=True) is None
    assert (tmp_path / "x.json").read_bytes() == b"{"


# Claims: the file's existence counts, whatever it holds.


def write_checkpoint(files: StageFiles, attempt: int, step: int) -> Checkpoint:
    folder = files.checkpoint_dir(attempt, step)
    write_atomic(folder / MANIFEST_FILE, b"{}")
    return Checkpoint(step=step, path=files.relative_path(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_lineage_remains_a_claim(damage: Callable[[Path], None], files: StageFiles) -> None:
    begin_attempt(files, 1)
    start = write_checkpoint(files, 1, 10)
    damage(lineage_path(files, 2))
    assert read_lineage(files, 2) is None
    with pytest.raises(Preempted):
        check_not_superseded(files, 1)
    assert begin_attempt(files, 3) == Lineage(attempt=3, start=start)
    assert lineage_path(files, 2).is_symlink() or lineage_path(files, 2).exists()


@pytest.mark.parametrize("content", [b"{", bytes(99), b'{"attempt":2,"start":{"step":1,"path":"../../x"}}'])
def test_attempt_replaces_its_own_unusable_lineage_without_giving_up_its_claim(
    content: bytes, files: StageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents.os, "rename", lambda *_: pytest.fail("the claim disappeared"))
    begin_attempt(files, 1)
    start = write_checkpoint(files, 1, 10)
    lineage_path(files, 2).write_bytes(content)
    assert begin_attempt(files, 2) == read_lineage(files, 2) == Lineage(attempt=2, start=start)
    (copy,) = files.attempts.glob("2.json.unusable-*")
    assert copy.read_bytes() == content


IMPOSSIBLE_STARTS = [
    pytest.param("demo/curate/checkpoints/attempt-0002/step-00000010", 10, id="of the attempt itself"),
    pytest.param("demo/curate/checkpoints/attempt-0003/step-00000010", 10, id="of a later attempt"),
    pytest.param("demo/curate/checkpoints/attempt-0001/step-00000010", 11, id="of another step"),
    pytest.param("other/curate/checkpoints/attempt-0001/step-00000010", 10, id="of another stage"),
    pytest.param("demo/curate/checkpoints/attempt-x/step-y", 10, id="without numbers"),
    pytest.param("../demo/curate/checkpoints/attempt-0001/step-00000010", 10, id="outside of the storage"),
]


@pytest.mark.parametrize(("path", "step"), IMPOSSIBLE_STARTS)
def test_lineage_with_an_impossible_start_is_not_followed(path: str, step: int, files: StageFiles) -> None:
    claim_stage(files, 1)
    lineage_path(files, 2).write_bytes(encode(Lineage(attempt=2, start=Checkpoint(step=step, path=path))))
    assert read_lineage(files, 2) is None
    assert list(iter_checkpoints(files, 2)) == []
    assert begin_attempt(files, 3).start is None


@pytest.mark.parametrize("name", ["²", "99999999999999999999", "-1", "1.0", "x"])
def test_file_whose_name_is_no_attempt_claims_nothing(name: str, files: StageFiles) -> None:
    claim_stage(files, 7)
    (files.attempts / f"{name}.json").touch()
    assert find_newest_attempt(files) == 7


def test_folder_whose_name_is_no_step_is_no_checkpoint(files: StageFiles) -> None:
    begin_attempt(files, 1)
    saved = write_checkpoint(files, 1, 10)
    for name in ("step-x", "step-", "step-99999999999999999999"):
        write_atomic(files.checkpoint_dir(1, 0).with_name(name) / MANIFEST_FILE, b"{}")
    assert files.list_checkpoints(1) == [saved]


def test_attempt_chooses_again_if_its_start_is_unusable(files: StageFiles) -> None:
    begin_attempt(files, 1)
    older, newest = write_checkpoint(files, 1, 10), write_checkpoint(files, 1, 20)
    assert begin_attempt(files, 2).start == newest
    assert begin_attempt(files, 2, is_usable=lambda checkpoint: checkpoint != newest).start == older
    assert read_lineage(files, 2) == Lineage(attempt=2, start=older)


SKIP = Skip(first=15, last=18, step=17, failures=2)
RECORD = NonFinite(
    attempt=1, step=17, quantity="loss", value="nan", samples=(1,), max_resume_step=14, skips=(SKIP,)
)  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        encode(replace(RECORD, attempt=2)),
        encode(replace(RECORD, step=-1)),
        encode(replace(RECORD, skips=(replace(SKIP, last=2),))),
        json.dumps({**json.loads(encode(RECORD)), "schema_version": 9}).encode(),
    ],
    ids=["truncated", "another attempt", "negative step", "reversed range", "another version"],
)
def test_unusable_non_finite_record_is_set_aside(content: bytes, files: StageFiles) -> None:
    begin_attempt(files, 1)
    non_finite_path(files, 1).write_bytes(content)
    assert read_non_finite(files, 1) is None
    assert not non_finite_path(files, 1).exists()
    assert begin_attempt(files, 2) == Lineage(attempt=2, start=None)


def test_lines_that_cannot_be_used_are_left_out(files: StageFiles) -> None:
    path = files.storage / "x.jsonl"
    good = encode(Checkpoint(step=1, path="x"))
    path.write_bytes(b"\n".join([good, b"[" * 100_000, b"\xff", b"{}", b"", b'{"step":1}', good[:5]]))
    assert list(iterate_lines(Checkpoint, path, files.roots)) == [Checkpoint(step=1, path="x")]


@pytest.mark.parametrize("make", [make_pipe, make_endless, make_directory, lambda path: None])
def test_lines_of_what_is_no_file_are_none(make: Callable[[Path], None], files: StageFiles) -> None:
    make(files.storage / "x.jsonl")
    assert list(iterate_lines(Checkpoint, files.storage / "x.jsonl", files.roots)) == []


def test_lines_of_a_sparse_or_growing_file_are_read_within_bounds(files: StageFiles) -> None:
    path, line = files.storage / "x.jsonl", encode(Checkpoint(step=1, path="x")) + b"\n"
    path.write_bytes(line)
    read = []
    for found in iterate_lines(Checkpoint, path, files.roots):
        read.append(found)
        with path.open("ab") as file:
            file.write(line)
    assert len(read) == 1
    os.truncate(path, 100 << 30)
    assert list(iterate_lines(Checkpoint, path, files.roots)) == []


def test_document_that_is_too_large_to_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    shards = [
        ShardInfo(name=str(n), samples=1, bytes=1, sha256="a" * 64, index_bytes=1, index_sha256="a" * 64)
        for n in range(9)
    ]
    with pytest.raises(ConfigError, match=r"would have 1\.\d KiB, but at most 1000 B are read; write fewer"):
        write_shard_manifest(tmp_path, shards)
    assert not (tmp_path / "manifest.json").exists()
    write_shard_manifest(tmp_path, shards[:4])
    assert read_shard_manifest(tmp_path).samples == 4


def test_manifest_with_values_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    shard = ShardInfo(name="../0", samples=1, bytes=1, sha256="a" * 64, index_bytes=1, index_sha256="a" * 64)
    with pytest.raises(ValueError, match="another name than that of a file beside it"):
        write_shard_manifest(tmp_path, [shard])
