"""`sailvl validate` and the command line around it: what it prints, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sailvl_operator.cli import main as cli
from tests.support.builders.operator import build_document

Write = Callable[..., str]

GOOD = yaml.safe_dump(build_document())
OTHER = yaml.safe_dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def _bend(old: str, new: str, text: str = GOOD) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_a_good_file(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(GOOD)
    assert cli.main(["validate", path]) == 0
    assert capsys.readouterr() == (f"{path}: demo: ok\n", "")


def test_several_documents_of_several_kinds(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    bad = _bend("preset: tiny", "preset: huge", _bend("name: demo", "name: other"))
    path = write("---\n".join((OTHER, GOOD, bad)))
    assert cli.main(["validate", path]) == 1
    out, err = capsys.readouterr()
    assert out == f"{path}: settings: ConfigMap, passed over\n{path}: demo: ok\n"
    assert err.startswith(f'{path}: other: spec.model.preset: Unsupported value: "huge"')


def test_all_files_are_looked_at(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("a: [", "first.yaml"), write(GOOD, "second.yaml")
    assert cli.main(["validate", first, second]) == 1
    out, err = capsys.readouterr()
    assert out == f"{second}: demo: ok\n"
    assert err.startswith(f"{first}: ")


BROKEN = {
    "no YAML": ("a: 1\nb: [", "line 2"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "a is there twice\n  in"),
    "a list": ("- a\n", "document 1 is no object"),
    "nothing of ours": (OTHER, "holds no SailVLRun"),
    "nothing": ("", "holds no SailVLRun"),
    "a number as a rate": (_bend("tokens: 32K", "tokens: 32K\n      learningRate: 2e-4"), "write it in quotes"),
    "another version": (_bend("sailvl.dev/v1alpha1", "sailvl.dev/v2"), "apiVersion: write sailvl.dev/v1alpha1"),
    "a misspelt kind": (_bend("kind: SailVLRun", "kind: SailVlRun"), "kind: write SailVLRun"),
    "no metadata": (yaml.safe_dump(build_document() | {"metadata": None}), "metadata.name: Required value"),
    "stages as a map": (yaml.safe_dump(build_document(stages={"a": {}})), "must be of type array"),
    "a misspelt field": (_bend("gpusPerNode", "gpuPerNode"), "unknown field; did you mean gpusPerNode?"),
    "a bad label": (
        yaml.safe_dump(build_document() | {"metadata": {"name": "a", "labels": {"b": 1}}}),
        "metadata.labels.b",
    ),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(text: str, words: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", write(text)]) == 1
    assert words in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_what_the_server_returns_is_good(write: Write) -> None:
    document = build_document()
    document["metadata"] |= {"uid": "u", "resourceVersion": "1", "generation": 2, "labels": {"team": "vision"}}
    document["status"] = {"stages": [{"name": "curate", "state": "Running"}]}
    assert cli.main(["validate", write(yaml.safe_dump(document))]) == 0


def test_merge_keys(write: Write) -> None:
    text = _bend("epochs: '1'", "<<: {epochs: '1', warmup: '0.1'}")
    assert cli.main(["validate", write(text)]) == 0


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("sailvl ")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_module(verb: str) -> None:
    module = cli.load_verb(verb)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(verb: str) -> None:
        raise ModuleNotFoundError("No module named 'kopf'", name="kopf")

    monkeypatch.setattr(cli, "load_verb", load)
    assert cli.main(["operator"]) == 2
    assert capsys.readouterr().err == "sailvl operator: kopf is not installed; pip install 'sailvl[operator]'\n"


def test_a_module_of_ours_missing_is_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(verb: str) -> None:
        raise ModuleNotFoundError(name="sailvl_operator.cli.other")

    monkeypatch.setattr(cli, "load_verb", load)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["operator"])
