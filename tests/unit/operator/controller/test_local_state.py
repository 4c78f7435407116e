"""Local mode with a root or files that it can't use: the message names them and says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sailvl_operator import local
from sailvl_operator.cli import main as cli
from sailvl_operator.local import LocalRun, LocalStateError
from tests.support.builders.operator import build_document, build_run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(build_document()))
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b'{"stages": [', b"\0" * 64, b"[]", b'{"stages": 7}', b"\xff", b"[" * 100_000],
    ids=["empty", "truncated", "zeros", "list", "type", "encoding", "depth"],
)
def test_status_that_cannot_be_read_is_named(
    content: bytes, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tmp_path / "root/demo/status.json"
    status.parent.mkdir(parents=True)
    status.write_bytes(content)
    assert cli.main(["run", "--local", str(recipe), "--root", str(tmp_path / "root")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sailvl run: {status} can't be read (")
    assert "delete it to start the run anew" in error


def test_list_of_processes_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/processes.json").write_text('["1"]')
    with pytest.raises(LocalStateError, match=r"processes\.json can't be read .* and delete it"):
        LocalRun(build_run(), tmp_path).run_to_completion(lambda *_: None)


def test_root_that_is_a_file_is_named(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    root.touch()
    assert cli.main(["run", "--local", str(recipe), "--root", str(root)]) == 2
    assert capsys.readouterr().err == f"sailvl run: {root} is not a directory; set --root to one\n"


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    with pytest.raises(LocalStateError, match=r"demo can't be written \(.*\); set --root to a directory of your own"):
        LocalRun(build_run(), tmp_path).run_to_completion(lambda *_: None)


def test_file_and_its_folder_are_synchronised_before_and_after_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "status.json", []

    def fsync(descriptor: int) -> None:
        order.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    local._write(path, b"{}")
    assert order == [("status.tmp", False), (tmp_path.name, True)]
    assert path.read_bytes() == b"{}"
