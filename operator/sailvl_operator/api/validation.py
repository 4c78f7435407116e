"""The API server's checks without a server: unknown fields, the schema, the CEL rules; then what isn't built yet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import celpy
import jsonschema

from sailvl_operator.api import names
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.parse import SpecError, parse_spec
from sailvl_operator.api.unsupported import unsupported

_INDEX = "x_index"


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldError:
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def validate(document: dict[str, Any]) -> list[FieldError]:
    """Everything that is wrong with a SailVLRun; empty: the API server and the operator take it."""
    wrong = list(_check_head(document))
    wrong += _check_schema(document)
    if wrong:
        return wrong
    wrong = list(_check_rules(fill_defaults(document, build_schema()), build_schema(), ""))
    if wrong:
        return wrong
    try:
        spec = parse_spec(document["spec"])
    except SpecError as error:
        return [FieldError(field="spec", message=str(error))]
    return [FieldError(field=path, message=words) for path, words in unsupported(spec)]


def fill_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy with the schema's defaults, as the API server stores it."""
    if isinstance(value, dict) and "properties" in schema:
        filled = copy.copy(value)
        for name, property_ in schema["properties"].items():
            if name in filled:
                filled[name] = fill_defaults(filled[name], property_)
            elif "default" in property_:
                filled[name] = property_["default"]
        return filled
    if isinstance(value, list):
        return [fill_defaults(item, schema["items"]) for item in value]
    return value


def _check_head(document: dict[str, Any]) -> Iterator[FieldError]:
    if document.get("apiVersion") != names.API_VERSION:
        yield FieldError(field="apiVersion", message=f"write {names.API_VERSION}")
    if document.get("kind") != names.KIND:
        yield FieldError(field="kind", message=f"write {names.KIND}")
    if not (document.get("metadata") or {}).get("name"):
        yield FieldError(field="metadata.name", message="required")


def _check_schema(document: dict[str, Any]) -> list[FieldError]:
    checker = jsonschema.Draft202012Validator(_closed(build_schema()))
    found = [FieldError(field=_path(e.absolute_path), message=e.message) for e in checker.iter_errors(document)]
    stages = (document.get("spec") or {}).get("stages")
    called = [s.get("name") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    doubled = sorted({str(name) for name in called if called.count(name) > 1})
    return found + [FieldError(field="spec.stages", message=f"Duplicate value: name {name}") for name in doubled]


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with fields that it doesn't name refused, as kubectl and strict field validation do."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: _closed(p) for name, p in schema["properties"].items()}
        is_metadata = schema["properties"].keys() == {"name"} and "maxLength" in schema["properties"]["name"]
        closed["additionalProperties"] = is_metadata and "required" not in schema
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    return closed


def _check_rules(value: Any, schema: dict[str, Any], path: str) -> Iterator[FieldError]:
    """The rules at a value and below it; those about a change (oldSelf) need a server."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield FieldError(field=path or rule.get("fieldPath", "").lstrip("."), message=rule["message"])
    if isinstance(value, dict):
        for name, child in value.items():
            if name in schema.get("properties", {}):
                yield from _check_rules(child, schema["properties"][name], f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from _check_rules(child, schema["items"], f"{path}[{index}]")


def _holds(rule: str, value: Any) -> bool:
    """Lists are numbered, since CEL in Python has no comprehensions of two variables."""
    numbered = [item | {_INDEX: i} for i, item in enumerate(value)] if isinstance(value, list) else value
    result = _program(rule).evaluate({"self": celpy.json_to_cel(numbered)})
    return bool(result)


@cache
def _program(rule: str) -> celpy.Runner:
    one = rule.replace("self.all(i, s, ", "self.all(s, ")
    one = one.replace("exists(j, p, j < i && ", f"exists(p, p.{_INDEX} < s.{_INDEX} && ")
    environment = celpy.Environment()
    return environment.program(environment.compile(one))


def _path(parts: Any) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "(whole)"
