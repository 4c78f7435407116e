"""`sailvl validate` refuses what must be refused, and takes every sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bad_specs import BAD_SPECS, BadSpec
from builders import build_document
from sailvl_operator.api.crd import build_crd
from sailvl_operator.api.validation import validate
from sailvl_operator.cli.documents import read_documents

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bad", BAD_SPECS, ids=lambda bad: bad.id)
def test_refused_with_field_and_words(bad: BadSpec) -> None:
    errors = validate(bad.build())
    assert any(e.field.startswith(bad.field) and bad.words in e.message for e in errors), [str(e) for e in errors]


def test_the_good_one_is_taken() -> None:
    assert validate(build_document()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "crds/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_samples_are_good(path: Path) -> None:
    for document in read_documents(path):
        assert validate(document) == []


def test_the_committed_resource_is_what_the_types_say() -> None:
    committed = yaml.safe_load((ROOT / "crds/sailvlruns.yaml").read_text())
    assert committed == build_crd()
