"""`sailvl validate` rejects invalid specs and accepts every sample; generated files match the types."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailvl_operator.api.validation import validate
from sailvl_operator.cli.generate import GENERATORS
from sailvl_operator.cli.validate import read_documents
from tests.support.builders.operator import build_document
from tests.support.invalid_specs import RUN_SCHEMA, UNSUPPORTED, InvalidSpec
from tests.support.invalid_stages import STAGE_SCHEMA

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("invalid", RUN_SCHEMA + STAGE_SCHEMA + UNSUPPORTED, ids=lambda invalid: invalid.id)
def test_invalid_spec_is_rejected_with_field_and_message(invalid: InvalidSpec) -> None:
    errors = validate(invalid.build())
    assert [error.field for error in errors] == [invalid.field], [str(error) for error in errors]
    assert invalid.message in errors[0].message


def test_valid_spec_is_accepted() -> None:
    assert validate(build_document()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/run.yaml")), ids=lambda path: path.parent.name)
def test_examples_are_valid(path: Path) -> None:
    for document in read_documents(path):
        assert validate(document) == []


@pytest.mark.parametrize(
    ("what", "path"), [("crd", "crds/sailvlruns.yaml"), ("reference", "docs/reference/sailvlrun.md")]
)
def test_generated_files_match_the_types(what: str, path: str) -> None:
    assert (ROOT / path).read_text() == GENERATORS[what](), "stale: make generate"
