"""The schema as a whole: every value is bounded and described, and defaults match those of the types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sailvl_operator.api import rules, stages, status, types, workers
from sailvl_operator.api.crd import build_crd, build_schema, describe_fields, struct_schema
from sailvl_operator.api.parse import parse_spec
from sailvl_operator.api.reference import build_reference
from sailvl_operator.api.scalars import HINTS
from sailvl_operator.api.validation import fill_defaults
from sailvl_operator.cli.validate import read_documents
from tests.support.builders.operator import build_document

EXAMPLES = sorted((Path(__file__).parents[4] / "examples").glob("*/run.yaml"))


def _walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _walk(schema[key], f"{path}[]")


SPEC, STATUS = (dict(_walk(build_schema()["properties"][name], name)) for name in ("spec", "status"))
LIMIT = {"string": ("maxLength", "enum"), "array": ("maxItems",), "map": ("maxProperties",), "integer": ("maximum",)}
UNBOUNDED = {"spec.workers.tolerations[].tolerationSeconds", "spec.stages[].workers.tolerations[].tolerationSeconds"}
"""Fields without a maximum, as in the pod API."""


def _kind(schema: dict[str, Any]) -> str:
    return "map" if "additionalProperties" in schema else str(schema["type"])


def test_every_value_is_bounded() -> None:
    unlimited = {
        path
        for path, schema in (SPEC | STATUS).items()
        if (limits := LIMIT.get(_kind(schema))) and not any(limit in schema for limit in limits)
    }
    counters = {path for path in unlimited if path.startswith("status") and (SPEC | STATUS)[path]["type"] == "integer"}
    assert unlimited - counters == UNBOUNDED


def test_schema_has_no_floats() -> None:
    assert {schema["type"] for schema in (SPEC | STATUS).values()} == {
        "object",
        "array",
        "string",
        "integer",
        "boolean",
    }


def test_every_pattern_has_a_hint() -> None:
    assert {schema["pattern"] for schema in SPEC.values() if "pattern" in schema} <= HINTS.keys()


def _structs(module: Any) -> list[type[msgspec.Struct]]:
    known = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, msgspec.Struct))
    return [struct for struct in known if msgspec.structs.fields(struct) and struct is not types.Run]


DESCRIBED = list(dict.fromkeys(s for module in (types, stages, stages, workers, status) for s in _structs(module)))


@pytest.mark.parametrize("struct", DESCRIBED, ids=lambda struct: struct.__name__)
def test_every_field_is_described(struct: type[msgspec.Struct]) -> None:
    assert {field.name for field in msgspec.structs.fields(struct)} == describe_fields(struct).keys()


def test_every_rule_is_part_of_the_schema() -> None:
    written = sum(len(schema.get("x-kubernetes-validations", ())) for schema in SPEC.values())
    assert written > sum(map(len, rules.RULES.values())), "each at least once, and those on the stages"


@pytest.mark.parametrize("struct", [stages.Pretrain, stages.Sft])
def test_inherited_fields_are_described(struct: type[msgspec.Struct]) -> None:
    assert "Peak learning rate" in struct_schema(struct)["properties"]["learningRate"]["description"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_server_side_defaults_match_the_types(path: Path) -> None:
    (document,) = read_documents(path)
    filled = fill_defaults(document, build_schema())
    assert filled["spec"] != document["spec"]
    assert parse_spec(filled["spec"]) == parse_spec(document["spec"])


def test_fill_defaults_does_not_modify_the_document() -> None:
    document = build_document()
    fill_defaults(document, build_schema())["spec"]["stages"][1]["pretrain"]["train"].append("vision")
    assert document == build_document()
    assert build_crd() == build_crd()


def test_status_has_no_defaults() -> None:
    assert not [path for path, schema in STATUS.items() if "default" in schema]


def test_links_of_the_reference_resolve() -> None:
    page = build_reference()
    heads = {line.removeprefix("## ").lower() for line in page.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\(#([a-z]+)\)", page)) <= heads


def test_printer_columns_are_status_fields() -> None:
    (version,) = build_crd()["spec"]["versions"]
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    assert set(paths) - {".metadata.creationTimestamp"} <= {f".{path}" for path in STATUS}
    assert {f".status.summary.{name}" for name in status.Summary.__struct_fields__} <= set(paths)
