"""`sailvl validate` and the command line around it: output and exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sailvl_operator.cli import main as cli
from tests.support.builders.operator import build_document

Write = Callable[..., str]

VALID = yaml.safe_dump(build_document())
OTHER = yaml.safe_dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def _replace(old: str, new: str, text: str = VALID) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_valid_file_is_accepted(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(VALID)
    assert cli.main(["validate", path]) == 0
    assert capsys.readouterr() == (f"{path}: demo: ok\n", "")


def test_each_document_of_a_file_is_validated(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    bad = _replace("preset: tiny", "preset: huge", _replace("name: demo", "name: other"))
    path = write("---\n".join((OTHER, VALID, bad)))
    assert cli.main(["validate", path]) == 1
    out, err = capsys.readouterr()
    assert out == f"{path}: settings: ConfigMap, skipped\n{path}: demo: ok\n"
    assert err.startswith(f'{path}: other: spec.model.preset: Unsupported value: "huge"')


def test_every_file_is_validated_after_an_error(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write("a: [", "first.yaml"), write(VALID, "second.yaml")
    assert cli.main(["validate", first, second]) == 1
    out, err = capsys.readouterr()
    assert out == f"{second}: demo: ok\n"
    assert err.startswith(f"{first}: ")


INVALID = {
    "invalid YAML": ("a: 1\nb: [", "line 2"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", "duplicate key a\n  in"),
    "document is a list": ("- a\n", "document 1 is not an object"),
    "no SailVLRun": (OTHER, "no SailVLRun found"),
    "empty file": ("", "no SailVLRun found"),
    "unquoted number": (
        _replace("tokens: 32K", "tokens: 32K\n      learningRate: 2e-4"),
        "quote it to make it a string",
    ),
    "unknown API version": (
        _replace("sailvl.dev/v1alpha1", "sailvl.dev/v2"),
        "apiVersion: must be sailvl.dev/v1alpha1",
    ),
    "misspelt kind": (_replace("kind: SailVLRun", "kind: SailVlRun"), "kind: must be SailVLRun"),
    "no metadata": (yaml.safe_dump(build_document() | {"metadata": None}), "metadata.name: Required value"),
    "stages is a map": (yaml.safe_dump(build_document(stages={"a": {}})), "must be of type array"),
    "misspelt field": (_replace("gpusPerNode", "gpuPerNode"), "unknown field; did you mean gpusPerNode?"),
    "label is not a string": (
        yaml.safe_dump(build_document() | {"metadata": {"name": "a", "labels": {"b": 1}}}),
        "metadata.labels.b",
    ),
}


@pytest.mark.parametrize(("text", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_file_is_rejected_with_message(
    text: str, message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["validate", write(text)]) == 1
    assert message in capsys.readouterr().err


def test_allow_lists_are_given_by_flags(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(VALID)
    assert cli.main(["validate", "--allowed-images", "registry.example.com", path]) == 0
    assert cli.main(["validate", "--allowed-images", "ghcr.io/team,quay.io", path]) == 1
    assert "is not allowed by the operator; it allows ghcr.io/team, quay.io" in capsys.readouterr().err
    assert cli.main(["validate", "--allowed-images", "ghcr.io/*", path]) == 2
    assert "is neither a registry nor a repository" in capsys.readouterr().err


def test_missing_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(tmp_path / "none.yaml")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_object_with_server_side_fields_is_accepted(write: Write) -> None:
    document = build_document()
    document["metadata"] |= {"uid": "u", "resourceVersion": "1", "generation": 2, "labels": {"team": "vision"}}
    document["status"] = {"stages": [{"name": "curate", "state": "Running"}]}
    assert cli.main(["validate", write(yaml.safe_dump(document))]) == 0


def test_yaml_merge_keys_are_resolved(write: Write) -> None:
    text = _replace("epochs: '1'", "<<: {epochs: '1', warmup: '0.1'}")
    assert cli.main(["validate", write(text)]) == 0


def test_version_flag_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("sailvl ")


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_module(verb: str) -> None:
    module = cli.load_verb(verb)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(verb: str) -> None:
        raise ModuleNotFoundError("No module named 'kopf'", name="kopf")

    monkeypatch.setattr(cli, "load_verb", load)
    assert cli.main(["operator"]) == 2
    assert capsys.readouterr().err == "sailvl operator: kopf is not installed; pip install 'sailvl[operator]'\n"


def test_missing_own_module_is_not_reported_as_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(verb: str) -> None:
        raise ModuleNotFoundError(name="sailvl_operator.cli.other")

    monkeypatch.setattr(cli, "load_verb", load)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["operator"])
