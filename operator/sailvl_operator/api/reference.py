"""Builds the Markdown reference of SailVLRun from the types, one table per struct, for `sailvl generate reference`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.benchmarks import BENCHMARKS
from sailvl_operator.api.crd import describe_fields, struct_schema, unwrap
from sailvl_operator.api.rules import RULES, RUN, STAGES, Rule
from sailvl_operator.api.status import Status
from sailvl_operator.api.types import Spec

_INTRODUCTION = f"""# {names.KIND}

`{names.API_VERSION}`, plural `{names.PLURAL}`, short `svr`. Generated from the types by `make generate`; do not edit.

Fractional numbers are decimal strings (`"2e-4"`); large counts may carry a suffix (`131B`). A field without a default
is unset unless its description says otherwise. The storage of the run is mounted at `/data`.
"""


def build_reference() -> str:
    """Build the whole page."""
    benchmarks = ["## Benchmarks", "", "| Name | Group | Metric | Tiles |", "|---|---|---|---|"]
    benchmarks += [f"| {name} | {b.group} | {b.metric} | {b.max_tiles} |" for name, b in BENCHMARKS.items()]
    rules = ["## Rules on the whole run", "", *_list_rules([*STAGES, *RUN])]
    structs = dict.fromkeys(itertools.chain(_reachable(Spec), _reachable(Status)))
    tables = [line for struct in structs for line in (*_describe_struct(struct), "")]
    return "\n".join([_INTRODUCTION, *tables, *rules, "", *benchmarks, ""])


def _reachable(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """Yield the struct, then the structs of its fields in order, depth first."""
    yield struct
    for field in msgspec.structs.fields(struct):
        inner = _find_struct(msgspec.inspect.type_info(field.type))
        if inner is not None:
            yield from _reachable(inner)


def _find_struct(info: Any) -> type[msgspec.Struct] | None:
    """Return the struct that a type is or contains as items, or None."""
    match info:
        case msgspec.inspect.StructType(cls=cls):
            found: type[msgspec.Struct] = cls
            return found
        case msgspec.inspect.UnionType(types=members):
            return next((s for s in map(_find_struct, members) if s is not None), None)
        case msgspec.inspect.Metadata(type=inner):
            return _find_struct(inner)
        case msgspec.inspect.VarTupleType(item_type=inner) | msgspec.inspect.ListType(item_type=inner):
            return _find_struct(inner)
    return None


def _describe_struct(struct: type[msgspec.Struct]) -> Iterator[str]:
    schema, descriptions = struct_schema(struct), describe_fields(struct)
    yield f"## {struct.__name__}"
    yield ""
    if struct.__doc__:
        yield from (_escape(unwrap(struct.__doc__)), "")
    yield from ("| Field | Type | Default | Description |", "|---|---|---|---|")
    for field in msgspec.structs.fields(struct):
        name = field.encode_name
        property_ = schema["properties"][name]
        cells = (
            f"`{name}`",
            _format_type(field, property_),
            _format_default(field, property_),
            descriptions.get(field.name, ""),
        )
        yield "| " + " | ".join(_escape(" ".join(cell.split())) for cell in cells) + " |"
    rules = _list_rules(RULES.get(struct, []))
    if rules:
        yield from ("", *rules)


def _list_rules(rules: Sequence[Rule]) -> list[str]:
    """Return the messages of the rules as list items without duplicates, each with the field that it is about."""
    fields = (rule.get("fieldPath", "").lstrip(".") for rule in rules)
    return list(
        dict.fromkeys(
            f"- `{field}`: {_escape(rule['message'])}" if field else f"- {_escape(rule['message'])}"
            for field, rule in zip(fields, rules, strict=True)
        )
    )


def _escape(text: str) -> str:
    """Escape the characters that Markdown would take for a table cell or an HTML tag."""
    return text.replace("|", "\\|").replace("<", "\\<")


def _format_type(field: msgspec.structs.FieldInfo, property_: dict[str, Any]) -> str:
    inner = _find_struct(msgspec.inspect.type_info(field.type))
    linked = "" if inner is None else f"[{inner.__name__}](#{inner.__name__.lower()})"
    return _format_schema(property_, linked)


def _format_schema(schema: dict[str, Any], linked: str) -> str:
    """Format the type of a schema; `linked` is the link to the struct inside, if there is one."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema["type"]:
        case "array":
            return f"list of {_format_schema(schema['items'], linked)}"
        case "object" if "additionalProperties" in schema:
            return f"map to {_format_schema(schema['additionalProperties'], linked)}"
        case "object":
            return linked
        case "integer" if "minimum" in schema:
            return f"integer, {schema['minimum']} to {schema['maximum']}"
    return str(schema["type"])


def _format_default(field: msgspec.structs.FieldInfo, property_: dict[str, Any]) -> str:
    if field.required:
        return "required"
    if "default" in property_:
        return f"`{json.dumps(property_['default'])}`"
    return f"`{json.dumps(field.default)}`" if isinstance(field.default, int) and field.default is not None else ""
