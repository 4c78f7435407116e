"""Every example is valid and complete, and its README's commands name files, stages and runs that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sailvl_operator.api import names
from sailvl_operator.api.validation import validate

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in (ROOT / "examples").iterdir() if path.is_dir())
each_example = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def read_run(folder: Path) -> dict[str, Any]:
    (run,) = yaml.safe_load_all((folder / "run.yaml").read_text())
    assert run["kind"] == names.KIND
    return run


def read_commands(folder: Path) -> str:
    """Return the shell blocks of an example's README, with continued lines joined."""
    text = (folder / "README.md").read_text()
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")


def test_examples_are_numbered_without_gaps() -> None:
    assert [folder.name[:2] for folder in FOLDERS] == [f"{n:02}" for n in range(1, len(FOLDERS) + 1)]


def test_overview_lists_every_example() -> None:
    listed = re.findall(r"\]\(([^)]+)/README\.md\)", (ROOT / "examples/README.md").read_text())
    assert listed == [folder.name for folder in FOLDERS]


@each_example
def test_run_is_valid(folder: Path) -> None:
    assert [str(error) for error in validate(read_run(folder))] == []


@each_example
def test_other_manifests_are_kubernetes_objects(folder: Path) -> None:
    for path in folder.glob("*.yaml"):
        if path.name != "values.yaml":
            for document in yaml.safe_load_all(path.read_text()):
                assert {"apiVersion", "kind", "metadata"} <= set(document), path.name


@each_example
def test_readme_says_what_to_expect_and_how_to_clean_up(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert text.startswith(f"# {folder.name[:2]}: ")
    for part in ("**Shows**", "**Expect**", "**Clean up.**"):
        assert part in text, part


@each_example
def test_commands_name_files_that_exist(folder: Path) -> None:
    named = re.findall(r"(?:-f|--values|validate) (\S+)", read_commands(folder))
    assert f"examples/{folder.name}/run.yaml" in named
    for path in named:
        assert (ROOT / path).is_file(), path


@each_example
def test_every_file_of_an_example_is_named_in_its_readme(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    for path in folder.iterdir():
        assert path.name == "README.md" or path.name in text, path.name


@each_example
def test_commands_name_this_run_and_its_stages(folder: Path) -> None:
    run, commands = read_run(folder), read_commands(folder)
    named = set(re.findall(r"\bsvr[ /]([a-z0-9-]+)", commands))
    assert named == {run["metadata"]["name"]}
    stages = {stage["name"] for stage in run["spec"]["stages"]}
    assert set(re.findall(rf"{re.escape(names.ANNOTATION_RESTART)}=(\S+)", commands)) <= stages


def test_values_of_examples_are_in_the_charts_schema() -> None:
    known = set(json.loads((ROOT / "helm/sailvl-operator/values.schema.json").read_text())["properties"])
    for path in (ROOT / "examples").glob("*/values.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= known, path
