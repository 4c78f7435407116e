"""What an error says of a volume, and what a control group says of memory."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from sailvl_trainer.contract import ExitCode
from sailvl_trainer.errors import DataError, StorageError
from sailvl_trainer.rank.cgroup import Memory, read_memory
from sailvl_trainer.storage.errors import format_bytes, storage_errors


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = r"the volume /\S* is full: \S+ \S+ of \S+ \S+ free.* \(No space left on device\) while writing {root}/file; make"
GONE = r"the volume of {root}/file is gone or broken \(.+\); see that it is mounted"
WORDS_OF_RUST = "Error while serializing: I/O error: No space left on device (os error 28)"
WORDS_OF_DUCKDB = 'IO Error: {"exception_message":"Could not write file","errno":"28"}'
TROUBLES = [
    pytest.param(OSError(errno.ENOSPC, "full"), FULL, id="full"),
    pytest.param(OSError(errno.EDQUOT, "full"), "Disk quota exceeded", id="a quota"),
    pytest.param(RuntimeError(WORDS_OF_RUST), FULL, id="safetensors and tokenizers"),
    pytest.param(RuntimeError(WORDS_OF_DUCKDB), FULL, id="DuckDB"),
    pytest.param(OSError("[Errno 28] Error writing bytes to file"), FULL, id="Arrow"),
    pytest.param(raised_from(DataError("shard 3"), OSError(errno.EIO, "io")), GONE, id="the cause of another error"),
    pytest.param(OSError(errno.ESTALE, "stale"), GONE, id="a server that forgot us"),
    pytest.param(OSError(errno.EROFS, "read-only"), GONE, id="mounted read-only after an error"),
]


@pytest.mark.parametrize(("error", "words"), TROUBLES)
def test_a_volume_that_is_full_or_gone(error: Exception, words: str, tmp_path: Path) -> None:
    expected = words.format(root=re.escape(str(tmp_path)))
    with pytest.raises(StorageError, match=expected) as said, storage_errors(tmp_path / "file"):
        raise error
    assert said.value.exit_code == ExitCode.STORAGE


OTHERS = [
    pytest.param(OSError(errno.EACCES, "closed"), id="a file that is closed to us"),
    pytest.param(OSError(errno.ENOENT, "missing"), id="a file that is missing"),
    pytest.param(raised_from(DataError("torn"), ValueError("odd")), id="bad data"),
    pytest.param(RuntimeError("CUDA error 28"), id="another 28"),
]


@pytest.mark.parametrize("error", OTHERS)
def test_what_is_no_trouble_of_the_volume_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), storage_errors(tmp_path, root=tmp_path):
        raise error


def test_a_missing_file_in_a_missing_tree_is_a_missing_volume(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    with pytest.raises(StorageError, match=f"the volume of {root} is gone"), storage_errors(root, root=root):
        (root / "attempts").iterdir().__next__()


def test_the_file_that_an_error_names_is_the_one_that_is_told(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "io", "/dev/shm/x")
    with pytest.raises(StorageError, match="the volume of /dev/shm/x is gone"), storage_errors(tmp_path):
        raise error


SIZES = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB"), (2**60, "1048576.0 TiB")]


@pytest.mark.parametrize(("number", "words"), SIZES)
def test_bytes_in_words(number: int, words: str) -> None:
    assert format_bytes(number) == words


V1 = {"memory.limit_in_bytes": "50000000", "memory.max_usage_in_bytes": "49999872"}
V2 = {"memory.max": "50000000", "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"}
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
GROUPS = [
    pytest.param(
        "0::/kubepods/pod1\n",
        {"memory.peak": "49000000", **V2},
        "kubepods/pod1",
        Memory(peak=49_000_000, limit=50_000_000, kills=2),
        id="version 2",
    ),
    pytest.param(
        "0::/kubepods/pod1\n",
        {"memory.current": "9", **V2, "memory.max": "max"},
        "",
        Memory(peak=9, limit=None, kills=2),
        id="version 2, an older kernel, seen from inside a container",
    ),
    pytest.param(
        "9:name=systemd:/\n4:cpu,memory:/job/7\n0::/\n",
        {**V1, "memory.oom_control": CONTROL},
        "memory/job/7",
        Memory(peak=49_999_872, limit=50_000_000, kills=1),
        id="version 1",
    ),
    pytest.param(
        "4:memory:/job/7\n",
        {**V1, "memory.limit_in_bytes": "9223372036854771712", "memory.oom_control": CONTROL},
        "memory",
        Memory(peak=49_999_872, limit=None, kills=1),
        id="version 1, inside a container without a limit",
    ),
    pytest.param("0::/\n", {}, "", Memory(), id="no word of memory"),
]


@pytest.mark.parametrize(("own", "group", "folder", "expected"), GROUPS)
def test_what_a_control_group_says(
    own: str, group: dict[str, str], folder: str, expected: Memory, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    (tmp_path / "mount" / folder).mkdir(parents=True)
    for name, text in group.items():
        (tmp_path / "mount" / folder / name).write_text(text)
    assert read_memory(tmp_path / "mount", tmp_path / "own") == expected


def test_this_machines_groups_are_read() -> None:
    assert read_memory().kills >= 0
    assert os.path.exists("/proc/self/cgroup")
