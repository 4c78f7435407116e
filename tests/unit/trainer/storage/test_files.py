"""Errors of a full or unavailable volume become StorageError; all other errors pass unchanged."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from sailvl_trainer.contract import ExitCode
from sailvl_trainer.errors import DataError, StorageError
from sailvl_trainer.storage.files import format_bytes, translate_storage_errors


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = r"the volume /\S* is full: \S+ \S+ of \S+ \S+ free.* \(No space left on device\) while writing {root}/file; free"
UNAVAILABLE = r"the volume of {root}/file is unavailable \(.+\); check that it is mounted"
RUST_MESSAGE = "Error while serializing: I/O error: No space left on device (os error 28)"
DUCKDB_MESSAGE = 'IO Error: {"exception_message":"Could not write file","errno":"28"}'
VOLUME_ERRORS = [
    pytest.param(OSError(errno.ENOSPC, "full"), FULL, id="full"),
    pytest.param(OSError(errno.EDQUOT, "full"), "Disk quota exceeded", id="quota exceeded"),
    pytest.param(RuntimeError(RUST_MESSAGE), FULL, id="safetensors and tokenizers"),
    pytest.param(RuntimeError(DUCKDB_MESSAGE), FULL, id="DuckDB"),
    pytest.param(OSError("[Errno 28] Error writing bytes to file"), FULL, id="Arrow"),
    pytest.param(raised_from(DataError("shard 3"), OSError(errno.EIO, "io")), UNAVAILABLE, id="cause of another error"),
    pytest.param(OSError(errno.ESTALE, "stale"), UNAVAILABLE, id="stale NFS handle"),
    pytest.param(OSError(errno.EROFS, "read-only"), UNAVAILABLE, id="remounted read-only"),
]


@pytest.mark.parametrize(("error", "message"), VOLUME_ERRORS)
def test_volume_error_becomes_storage_error(error: Exception, message: str, tmp_path: Path) -> None:
    expected = message.format(root=re.escape(str(tmp_path)))
    with pytest.raises(StorageError, match=expected) as caught, translate_storage_errors(tmp_path / "file"):
        raise error
    assert caught.value.exit_code == ExitCode.STORAGE


OTHER_ERRORS = [
    pytest.param(OSError(errno.EACCES, "denied"), id="permission denied"),
    pytest.param(OSError(errno.ENOENT, "missing"), id="missing file"),
    pytest.param(raised_from(DataError("torn"), ValueError("odd")), id="bad data"),
    pytest.param(RuntimeError("CUDA error 28"), id="another error 28"),
]


@pytest.mark.parametrize("error", OTHER_ERRORS)
def test_other_error_is_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), translate_storage_errors(tmp_path, root=tmp_path):
        raise error


def test_missing_file_below_missing_root_means_unavailable_volume(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    with (
        pytest.raises(StorageError, match=f"the volume of {root} is unavailable"),
        translate_storage_errors(root, root=root),
    ):
        (root / "attempts").iterdir().__next__()


def test_message_names_the_file_of_the_error(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "io", "/dev/shm/x")
    with (
        pytest.raises(StorageError, match="the volume of /dev/shm/x is unavailable"),
        translate_storage_errors(tmp_path),
    ):
        raise error


SIZES = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB"), (2**60, "1048576.0 TiB")]


@pytest.mark.parametrize(("number", "text"), SIZES)
def test_bytes_are_formatted_with_binary_units(number: int, text: str) -> None:
    assert format_bytes(number) == text
