"""`sailvl validate` refuses what must be refused, and takes every sample; generated files are what the types say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_operator.api.validation import validate
from sailvl_operator.cli.documents import read_documents
from sailvl_operator.cli.generate import WHAT
from tests.support.builders.operator import build_document
from tests.support.invalid_specs import OPERATOR, SCHEMA, BadSpec

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bad", SCHEMA + OPERATOR, ids=lambda bad: bad.id)
def test_refused_with_field_and_words(bad: BadSpec) -> None:
    errors = validate(bad.build())
    assert [error.field for error in errors] == [bad.field], [str(error) for error in errors]
    assert bad.words in errors[0].message


def test_the_good_one_is_taken() -> None:
    assert validate(build_document()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "crds/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_samples_are_good(path: Path) -> None:
    for document in read_documents(path):
        assert validate(document) == []


@pytest.mark.parametrize(
    ("what", "path"), [("crd", "crds/sailvlruns.yaml"), ("reference", "docs/reference/sailvlrun.md")]
)
def test_generated_files_are_what_the_types_say(what: str, path: str) -> None:
    assert (ROOT / path).read_text() == WHAT[what](), "stale: make generate"
