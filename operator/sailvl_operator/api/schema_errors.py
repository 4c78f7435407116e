"""Errors of jsonschema, rephrased as the API server phrases them, each with the path of its field.

Called by `validation.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import jsonschema

from sailvl_operator.api.scalars import HINTS

SchemaError = tuple[str, str]
"""Path of a field and the error message."""

_MESSAGES = {
    "minimum": "should be greater than or equal to {limit}",
    "maximum": "should be less than or equal to {limit}",
    "minLength": "should be at least {limit} chars long",
    "maxLength": "may not be more than {limit} bytes",
    "minItems": "should have at least {limit} items",
    "maxItems": "must have at most {limit} items",
    "maxProperties": "must have at most {limit} items",
}


def check_schema(document: Any, schema: dict[str, Any]) -> Iterator[SchemaError]:
    """Yield every violation of the schema, including unknown fields and duplicate list items."""
    for error in _Validator(_forbid_unknown_fields(schema)).iter_errors(document):
        yield from _rephrase(error)
    yield from _check_duplicates(document, schema, "")


def format_path(parts: Iterable[str | int]) -> str:
    """Join the parts of a path, as in spec.stages[0].name."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _check_pattern(_: Any, pattern: str, value: Any, schema: dict[str, Any]) -> Iterator[jsonschema.ValidationError]:
    """Yield an error if a string doesn't match a pattern as the API server reads it.

    Its `$` matches at the end alone, while Python's also matches before a final line break.
    """
    if isinstance(value, str) and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


_Validator: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator, {"pattern": _check_pattern}
)


def _rephrase(error: jsonschema.ValidationError) -> Iterator[SchemaError]:
    path = format_path(error.absolute_path)
    rule, limit, value = str(error.validator), cast(Any, error.validator_value), cast(Any, error.instance)
    match rule:
        case "required":
            yield from ((f"{path}.{name}".lstrip("."), "Required value") for name in limit if name not in value)
        case "additionalProperties":
            yield from _unknown_fields(path, value, error.schema)
        case "enum":
            known = ", ".join(map(_quote, limit))
            yield path, f"Unsupported value: {_quote(value)}: supported values: {known}"
        case "type":
            yield path, f"Invalid value: {_quote(value)}: must be of type {limit}{_hint_quotes(value, limit)}"
        case "pattern":
            yield path, f"Invalid value: {_quote(value)}: should match '{limit}': {HINTS[limit]}"
        case _:
            yield path, f"Invalid value: {_quote(value)}: {_MESSAGES[rule].format(limit=limit)}"


def _unknown_fields(path: str, value: Any, schema: Any) -> Iterator[SchemaError]:
    known = schema["properties"]
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            yield f"{path}.{name}".lstrip("."), f"unknown field{hint}"


def _hint_quotes(value: Any, kind: str) -> str:
    return "; quote it to make it a string" if isinstance(value, int | float) and kind == "string" else ""


def _quote(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _check_duplicates(value: Any, schema: dict[str, Any], path: str) -> Iterator[SchemaError]:
    """Yield duplicate items of lists that are a set or a map by name."""
    if isinstance(value, dict):
        for name, child in value.items():
            property_ = schema.get("properties", {}).get(name, {})
            yield from _check_duplicates(child, property_, f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        yield from _check_items(value, schema, path)
        for index, child in enumerate(value):
            yield from _check_duplicates(child, schema.get("items", {}), f"{path}[{index}]")


def _check_items(items: list[Any], schema: dict[str, Any], path: str) -> Iterator[SchemaError]:
    kind = schema.get("x-kubernetes-list-type")
    seen: list[Any] = []
    for index, item in enumerate(items):
        key = {"name": item.get("name")} if kind == "map" and isinstance(item, dict) else item
        if kind in ("set", "map") and key in seen:
            yield f"{path}[{index}]", f"Duplicate value: {_quote(key)}"
        seen.append(key)


def _forbid_unknown_fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the schema that forbids unknown fields, as strict field validation of the API server does."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {
            name: _forbid_unknown_fields(property_) for name, property_ in schema["properties"].items()
        }
        closed["additionalProperties"] = False
    if "items" in schema:
        closed["items"] = _forbid_unknown_fields(schema["items"])
    return closed
