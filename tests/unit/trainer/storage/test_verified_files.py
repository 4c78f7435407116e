"""The record of verified files stays small, however often the times of modification of all files change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.hashes import HashedFile, hash_file
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.verified_files import VerifiedFiles
from tests.support.builders.worker import build_stage

FILES = 5


@pytest.fixture
def hashed(tmp_path: Path) -> list[HashedFile]:
    """Write the files of a set, and return them with their hashes."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(FILES):
        (folder / str(number)).write_text(str(number))
    roots = DataRoots.resolve(folder)
    return [HashedFile(path=path, expected=hash_file(path, roots)) for path in sorted(folder.iterdir())]


def mount_again(hashed: list[HashedFile], mount: int) -> None:
    """Change the times of modification of all files, as some volumes do with each mount."""
    for file in hashed:
        os.utime(file.path, ns=(mount, mount))


def verify_pending(root: Path, attempt: int, hashed: list[HashedFile]) -> int:
    """Verify what is pending in an attempt with two processes, and return the number of files."""
    files = StageFiles(build_stage(root, attempt=attempt))
    first, second = (VerifiedFiles(files, attempt=attempt, writer=str(rank)) for rank in range(2))
    first.merge_superseded()
    pending = first.list_pending(hashed, lambda: None)
    for number in pending:
        assert (first, second)[number % 2].verify(hashed[number], files.roots, lambda: None) == ""
    return len(pending)


def read_lines(root: Path) -> list[str]:
    return [line for path in (root / "demo/verified").iterdir() for line in path.read_text().splitlines()]


def test_record_stays_bounded_although_each_attempt_verifies_all_files_again(
    hashed: list[HashedFile], tmp_path: Path
) -> None:
    for attempt in range(1, 30):
        mount_again(hashed, attempt)
        assert verify_pending(tmp_path, attempt, hashed) == FILES
        assert verify_pending(tmp_path, attempt, hashed) == 0
        assert len(read_lines(tmp_path)) <= 3 * FILES
        assert len(list((tmp_path / "demo/verified").iterdir())) <= 6


def test_newest_lines_remain_when_records_are_merged(hashed: list[HashedFile], tmp_path: Path) -> None:
    for attempt in (9, 10):
        mount_again(hashed, attempt)
        verify_pending(tmp_path, attempt, hashed)
    assert verify_pending(tmp_path, 11, hashed) == 0
    assert len(read_lines(tmp_path)) == FILES
    assert [path.name for path in (tmp_path / "demo/verified").iterdir()] == ["curate-10-merged.jsonl"]


def test_records_of_other_stages_and_of_this_attempt_are_not_merged(hashed: list[HashedFile], tmp_path: Path) -> None:
    folder = tmp_path / "demo/verified"
    for attempt in (1, 2):
        mount_again(hashed, attempt)
        verify_pending(tmp_path, attempt, hashed)
    text = (folder / "curate-1-0.jsonl").read_bytes()
    remaining = ["curate-3-0.jsonl", "other-1-0.jsonl", "curate-b-1-0.jsonl", "curate-1.json"]
    for name in remaining:
        (folder / name).write_bytes(text)
    VerifiedFiles(StageFiles(build_stage(tmp_path)), attempt=3, writer="0").merge_superseded()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*remaining, "curate-2-merged.jsonl"])


def test_record_without_superseded_lines_is_left_as_it_is(hashed: list[HashedFile], tmp_path: Path) -> None:
    verify_pending(tmp_path, 1, hashed)
    before = sorted(path.name for path in (tmp_path / "demo/verified").iterdir())
    verify_pending(tmp_path, 2, hashed)
    assert sorted(path.name for path in (tmp_path / "demo/verified").iterdir()) == before
