"""Offline validation of a SailVLRun: unknown fields, schema, CEL rules, then fields that aren't supported yet.

It reports what the API server and the operator would reject. Called by `sailvl validate` and by local mode. celpy
evaluates the CEL rules; it lacks two-variable comprehensions and some functions that Kubernetes adds, for which
`rules.OFFLINE` has replacements.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sailvl_operator.api import names
from sailvl_operator.api.allow_lists import ALLOW_ALL, AllowLists, find_disallowed_fields
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.parse import SpecError, find_unsupported_fields, parse_spec
from sailvl_operator.api.rules import OFFLINE
from sailvl_operator.api.schema_errors import check_schema

if TYPE_CHECKING:
    import celpy

_INDEX = "x_index"
"""Field with the index of a list item, added because celpy has no two-variable comprehensions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldError:
    """A validation error of one field."""

    field: str
    """Path of the field, as in spec.stages[0].name."""
    message: str
    """The violation and, where known, the value to set instead."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def validate(document: dict[str, Any], allowed: AllowLists = ALLOW_ALL) -> list[FieldError]:
    """Return all validation errors of a SailVLRun; an empty list means that API server and operator accept it.

    `allowed` are the allow-lists of the installation that will execute the run.

    Transition rules (`oldSelf`) are not evaluated, since only the API server knows the previous object.
    """
    errors = list(_check_header(document))
    errors += [FieldError(field=field, message=message) for field, message in check_schema(document, _full_schema())]
    if errors:
        return errors
    return list(_check_rules(fill_defaults(document, build_schema()), build_schema(), "")) or _check_spec(
        document, allowed
    )


def fill_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Return a copy in which unset fields have the defaults of the schema, as the API server stores it."""
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for name, property_ in schema["properties"].items():
            if name in filled:
                filled[name] = fill_defaults(filled[name], property_)
            elif "default" in property_:
                filled[name] = copy.deepcopy(property_["default"])
        return filled
    if isinstance(value, list):
        return [fill_defaults(item, schema["items"]) for item in value]
    return copy.deepcopy(value)


def _check_header(document: dict[str, Any]) -> Iterator[FieldError]:
    for field, known in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if document.get(field) != known:
            yield FieldError(field=field, message=f"must be {known}")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or "name" not in metadata:
        yield FieldError(field="metadata.name", message="Required value")


@cache
def _full_schema() -> dict[str, Any]:
    """Return the schema extended by the fields of metadata, which the API server validates itself."""
    schema = dict(build_schema())
    text, texts = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
    known = dict.fromkeys(("namespace", "uid", "resourceVersion", "creationTimestamp"), text)
    free: dict[str, Any] = {name: {} for name in ("managedFields", "ownerReferences", "finalizers", "generation")}
    metadata = schema["properties"]["metadata"]
    properties = metadata["properties"] | known | free | {"labels": texts, "annotations": texts}
    schema["properties"] = schema["properties"] | {"metadata": metadata | {"properties": properties}}
    return schema


def _check_rules(value: Any, schema: dict[str, Any], path: str) -> Iterator[FieldError]:
    """Yield violations of the CEL rules of a value and of all values below it."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield from _check_rule(rule, value, path)
    if isinstance(value, dict):
        for name, child in value.items():
            if name in schema.get("properties", {}):
                yield from _check_rules(child, schema["properties"][name], f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from _check_rules(child, schema["items"], f"{path}[{index}]")


def _check_rule(rule: dict[str, str], value: Any, path: str) -> Iterator[FieldError]:
    if _is_transition_rule(rule["rule"]) or _evaluate_cel(rule["rule"], value):
        return
    expression = rule.get("messageExpression")
    message = rule["message"] if expression is None else str(_evaluate_cel(expression, value))
    yield FieldError(field=f"{path}{rule.get('fieldPath', '')}".lstrip("."), message=message)


def _is_transition_rule(rule: str) -> bool:
    """Whether a rule compares with the stored object, so that it can't be evaluated for a file."""
    return "oldSelf" in rule


def _evaluate_cel(expression: str, value: Any) -> Any:
    """Evaluate a CEL expression with celpy, or its replacement if celpy lacks a function that it needs."""
    import celpy  # imported lazily: importing and compiling its grammar takes 0.5 s

    indexed = value
    if isinstance(value, list):
        indexed = [item | {_INDEX: i} if isinstance(item, dict) else item for i, item in enumerate(value)]
    return _compile_cel(OFFLINE.get(expression, expression)).evaluate({"self": celpy.json_to_cel(indexed)})


@cache
def _compile_cel(expression: str) -> celpy.Runner:
    environment = _build_cel_environment()
    return environment.program(environment.compile(expression))


@cache
def _build_cel_environment() -> celpy.Environment:
    import celpy

    return celpy.Environment()


def _check_spec(document: dict[str, Any], allowed: AllowLists) -> list[FieldError]:
    try:
        spec = parse_spec(document["spec"])
    except SpecError as error:
        field, _, message = str(error).partition(": ")
        return [FieldError(field=field, message=message)]
    problems = find_unsupported_fields(spec) + find_disallowed_fields(spec, allowed)
    return [FieldError(field=field, message=message) for field, message in problems]
