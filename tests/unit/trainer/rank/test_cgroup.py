"""Memory and cores of the worker's control group, in versions 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sailvl_trainer.rank.cgroup import MemoryUsage, count_cores, read_memory, read_memory_limit

V1 = {"memory.limit_in_bytes": "50000000", "memory.max_usage_in_bytes": "49999872"}
V2 = {"memory.max": "50000000", "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"}
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
GROUPS = [
    pytest.param(
        "0::/kubepods/pod1\n",
        {"memory.peak": "49000000", **V2},
        "kubepods/pod1",
        MemoryUsage(peak_bytes=49_000_000, limit_bytes=50_000_000, oom_kills=2),
        id="version 2",
    ),
    pytest.param(
        "0::/kubepods/pod1\n",
        {"memory.current": "9", **V2, "memory.max": "max"},
        "",
        MemoryUsage(peak_bytes=9, limit_bytes=None, oom_kills=2),
        id="version 2 without memory.peak, in a container",
    ),
    pytest.param(
        "9:name=systemd:/\n4:cpu,memory:/job/7\n0::/\n",
        {**V1, "memory.oom_control": OOM_CONTROL},
        "memory/job/7",
        MemoryUsage(peak_bytes=49_999_872, limit_bytes=50_000_000, oom_kills=1),
        id="version 1",
    ),
    pytest.param(
        "4:memory:/job/7\n",
        {**V1, "memory.limit_in_bytes": "9223372036854771712", "memory.oom_control": OOM_CONTROL},
        "memory",
        MemoryUsage(peak_bytes=49_999_872, limit_bytes=None, oom_kills=1),
        id="version 1 without a limit, in a container",
    ),
    pytest.param("0::/\n", {}, "", MemoryUsage(), id="no memory controller"),
]


@pytest.mark.parametrize(("own", "group", "folder", "expected"), GROUPS)
def test_memory_is_read_from_the_cgroup(
    own: str, group: dict[str, str], folder: str, expected: MemoryUsage, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    (tmp_path / "mount" / folder).mkdir(parents=True)
    for name, text in group.items():
        (tmp_path / "mount" / folder / name).write_text(text)
    assert read_memory(tmp_path / "mount", tmp_path / "own") == expected


def test_memory_of_this_machine_is_read() -> None:
    assert read_memory().oom_kills >= 0
    assert os.path.exists("/proc/self/cgroup")


QUOTAS = [
    pytest.param("max 100000\n", None, id="no quota"),
    pytest.param("100000 100000\n", 1, id="one core"),
    pytest.param("50000 100000\n", 1, id="half a core, rounded up"),
    pytest.param("99900000 100000\n", None, id="more than the machine has"),
]


@pytest.mark.parametrize(("text", "cores"), QUOTAS)
def test_cores_are_limited_by_the_cgroup_quota(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert count_cores(tmp_path / "cpu.max") == (cores or count_cores(tmp_path / "nowhere"))


def test_memory_limit_is_that_of_the_container_or_of_the_machine(tmp_path: Path) -> None:
    installed = read_memory_limit(tmp_path, tmp_path / "no groups")
    assert installed == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, text in V2.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.peak").write_text("0")
    assert read_memory_limit(tmp_path, tmp_path / "no groups") == 50_000_000
    (tmp_path / "memory.max").write_text(str(1 << 59))
    assert read_memory_limit(tmp_path, tmp_path / "no groups") == installed
