"""The API server's checks without a server: unknown fields, the schema, the CEL rules; then what isn't built yet.

Called by the command line and by local mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.crd import build_schema
from sailvl_operator.api.parse import SpecError, parse_spec
from sailvl_operator.api.schema_errors import check_schema
from sailvl_operator.api.unsupported import unsupported


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldError:
    field: str
    """Its path: spec.stages[0].name."""
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def validate(document: dict[str, Any]) -> list[FieldError]:
    """Everything that is wrong with a SailVLRun; empty: the API server and the operator take it.

    What a change may not touch (`oldSelf`) is the server's alone to say.
    """
    wrong = list(_check_head(document))
    wrong += [FieldError(field=field, message=words) for field, words in check_schema(document, _whole_schema())]
    if wrong:
        return wrong
    return list(_check_rules(fill_defaults(document, build_schema()), build_schema(), "")) or _check_spec(document)


def fill_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy with the schema's defaults, as the API server stores it."""
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


def _check_head(document: dict[str, Any]) -> Iterator[FieldError]:
    for field, known in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if document.get(field) != known:
            yield FieldError(field=field, message=f"write {known}")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or "name" not in metadata:
        yield FieldError(field="metadata.name", message="Required value")


@cache
def _whole_schema() -> dict[str, Any]:
    """The schema with the fields of metadata, which the server checks by itself and no schema may list."""
    schema = dict(build_schema())
    text, texts = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
    known = dict.fromkeys(("namespace", "uid", "resourceVersion", "creationTimestamp"), text)
    free: dict[str, Any] = {name: {} for name in ("managedFields", "ownerReferences", "finalizers", "generation")}
    metadata = schema["properties"]["metadata"]
    properties = metadata["properties"] | known | free | {"labels": texts, "annotations": texts}
    schema["properties"] = schema["properties"] | {"metadata": metadata | {"properties": properties}}
    return schema


def _check_rules(value: Any, schema: dict[str, Any], path: str) -> Iterator[FieldError]:
    """The rules at a value and below it."""
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
    from sailvl_operator.api import cel  # its import and grammar take half of a second: only for what has a rule

    if cel.is_about_change(rule["rule"]) or cel.holds(rule["rule"], value):
        return
    words = cel.say(rule["messageExpression"], value) if "messageExpression" in rule else rule["message"]
    yield FieldError(field=f"{path}{rule.get('fieldPath', '')}".lstrip("."), message=words)


def _check_spec(document: dict[str, Any]) -> list[FieldError]:
    try:
        spec = parse_spec(document["spec"])
    except SpecError as error:
        field, _, words = str(error).partition(": ")
        return [FieldError(field=field, message=words)]
    return [FieldError(field=field, message=words) for field, words in unsupported(spec)]
