"""Tests of opening files of data sets, which may be links, pipes, devices, or of any size."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from sailvl_trainer.storage import data_files
from sailvl_trainer.storage.data_files import DataRoots, RefusedFileError, open_data_file, read_data_file, read_part


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "private.txt").write_text("of another data set")
    (tmp_path / "data-2").mkdir()
    (tmp_path / "data-2" / "neighbour.txt").write_text("name begins as the root's")
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


IRREGULAR_FILES = [
    pytest.param(os.mkfifo, id="pipe without a writer"),
    pytest.param(lambda path: path.symlink_to("/dev/zero"), id="device without an end"),
    pytest.param(make_socket, id="socket"),
    pytest.param(lambda path: path.mkdir(), id="directory"),
    pytest.param(lambda path: path.symlink_to("/proc/self/fd"), id="link to a directory"),
]


@pytest.mark.parametrize("make", IRREGULAR_FILES)
def test_anything_but_a_regular_file_is_refused_without_blocking(root: Path, make: Callable[[Path], object]) -> None:
    make(root / "a.png")
    with pytest.raises(RefusedFileError, match="not a regular file") as refused:
        open_data_file(root / "a.png", DataRoots.resolve(root))
    assert refused.value.reason == "irregular_file"


OUTSIDE_FILES = [
    pytest.param("/proc/self/environ", id="environment of the process"),
    pytest.param("../private.txt", id="file beside the root"),
    pytest.param("../data-2/neighbour.txt", id="directory whose name begins as the root's"),
]


@pytest.mark.parametrize("target", OUTSIDE_FILES)
def test_file_outside_of_the_roots_is_refused_by_link_and_by_path(root: Path, target: str) -> None:
    (root / "a.txt").symlink_to(target)
    for path in (root / "a.txt", root / target):
        with pytest.raises(RefusedFileError, match="outside") as refused:
            open_data_file(path, DataRoots.resolve(root))
        assert refused.value.reason == "outside_root"


def test_links_within_the_roots_are_followed_as_in_the_hugging_face_cache(root: Path, tmp_path: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs" / "hash").write_bytes(b"image")
    (root / "snapshot").mkdir()
    (root / "snapshot" / "a.png").symlink_to("../blobs/hash")
    (tmp_path / "configured").symlink_to(root)
    for roots in (DataRoots.resolve(root), DataRoots.resolve(root / "snapshot", tmp_path / "configured")):
        assert read_data_file(tmp_path / "configured" / "snapshot" / "a.png", roots, max_bytes=5) == b"image"
    with pytest.raises(RefusedFileError, match="outside"):
        open_data_file(root / "snapshot" / "a.png", DataRoots.resolve(root / "snapshot"))


def test_root_may_be_the_file_itself(root: Path) -> None:
    (root / "a.tar").write_bytes(b"tar")
    (root / "b.tar").write_bytes(b"tar")
    roots = DataRoots.resolve(root / "a.tar")
    assert read_data_file(root / "a.tar", roots, max_bytes=3) == b"tar"
    with pytest.raises(RefusedFileError, match="outside"):
        open_data_file(root / "b.tar", roots)


def test_file_exchanged_after_the_check_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "a.txt"
    path.write_bytes(b"own")
    read_link = os.readlink

    def exchange_after_the_check(opened: str) -> str:
        checked = read_link(opened)
        path.unlink()
        path.symlink_to("../private.txt")
        return checked

    monkeypatch.setattr(os, "readlink", exchange_after_the_check)
    assert read_data_file(path, DataRoots.resolve(root), max_bytes=100) == b"own"


def test_reading_stops_at_the_limit(root: Path) -> None:
    path = root / "a.txt"
    path.write_bytes(b"x" * 100)
    assert len(read_data_file(path, DataRoots.resolve(root), max_bytes=100)) == 100
    with pytest.raises(RefusedFileError, match="larger than 99 bytes") as refused:
        read_data_file(path, DataRoots.resolve(root), max_bytes=99)
    assert refused.value.reason == "too_large"


def test_file_without_a_size_is_read_up_to_the_limit() -> None:
    roots = DataRoots.resolve("/proc")
    assert read_data_file("/proc/version", roots, max_bytes=10_000).startswith(b"Linux")
    with pytest.raises(RefusedFileError, match="larger than 10 bytes"):
        read_data_file("/proc/version", roots, max_bytes=10)


class StaleFile:
    """A file that another client of an NFS volume has replaced since it was opened."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __enter__(self) -> StaleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int) -> int:
        return offset

    def read(self, size: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_file_that_became_stale_while_it_was_opened_is_opened_once_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.txt").write_bytes(b"new")
    failures, open_path = [errno.ESTALE], os.open

    def fail_first(path: str, *arguments: int) -> int:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return open_path(path, *arguments)

    monkeypatch.setattr(os, "open", fail_first)
    with open_data_file(root / "a.txt", DataRoots.resolve(root)) as file:
        assert file.read() == b"new"
    for numbers in ([errno.ESTALE, errno.ESTALE], [errno.EIO]):
        failures[:] = numbers
        with pytest.raises(OSError, match=r"Stale file handle|Input/output error"):
            open_data_file(root / "a.txt", DataRoots.resolve(root))


def test_file_that_became_stale_while_it_was_read_is_opened_once_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.txt").write_bytes(b"0123")
    roots, open_file, opened = DataRoots.resolve(root), data_files.open_data_file, []

    def open_stale(path: Path, roots: DataRoots) -> object:
        opened.append(path)
        file = open_file(path, roots)
        return StaleFile(file) if len(opened) == 1 else file

    monkeypatch.setattr(data_files, "open_data_file", open_stale)
    assert read_data_file(root / "a.txt", roots, max_bytes=4) == b"0123"
    with open_file(root / "a.txt", roots) as file:
        part = read_part(StaleFile(file), root / "a.txt", roots, offset=1, size=2)  # type: ignore[arg-type]
    assert part == b"12"
    assert len(opened) == 3


def test_system_without_path_descriptors_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_PATH")
    monkeypatch.delitem(sys.modules, "sailvl_trainer.storage.data_files")
    with pytest.raises(ImportError, match="the trainer needs Linux"):
        importlib.import_module("sailvl_trainer.storage.data_files")


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"], ids=["NUL", "half a surrogate pair"])
def test_name_that_no_file_can_have_is_refused(root: Path, name: str) -> None:
    with pytest.raises(RefusedFileError, match="not a valid file name"):
        open_data_file(f"{root}/{name}", DataRoots.resolve(root))


def test_error_of_the_system_names_the_file_and_leaves_no_descriptor_open(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied", "/proc/self/fd/7")

    before = os.listdir("/proc/self/fd")
    (root / "link").symlink_to("../private.txt")
    for name, error in (("gone", FileNotFoundError), ("link", RefusedFileError)):
        with pytest.raises(error):
            open_data_file(root / name, DataRoots.resolve(root))
    (root / "closed").touch()
    monkeypatch.setattr(os, "readlink", refuse)
    with pytest.raises(PermissionError, match="closed"):
        open_data_file(root / "closed", DataRoots.resolve(root))
    assert os.listdir("/proc/self/fd") == before
