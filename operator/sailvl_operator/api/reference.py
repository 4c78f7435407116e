"""The reference of SailVLRun as Markdown, from the types: a table a struct. `sailvl generate reference` prints it."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from sailvl_operator.api import names
from sailvl_operator.api.benchmarks import BENCHMARKS
from sailvl_operator.api.crd import describe_fields, struct_schema
from sailvl_operator.api.rules import RULES, RUN, STAGES
from sailvl_operator.api.status import Status
from sailvl_operator.api.types import Spec

_INTRODUCTION = f"""# {names.KIND}

`{names.API_VERSION}`, plural `{names.PLURAL}`, short `svr`. Generated from the types by `make generate`; do not edit.

Numbers with a fraction are decimal strings (`"2e-4"`), large counts may carry a suffix (`131B`). A field without a
default is unset unless the text says otherwise. `/data` is the run's storage.
"""


def build_reference() -> str:
    """The whole page."""
    benchmarks = ["## Benchmarks", "", "| Name | Group | Metric | Tiles |", "|---|---|---|---|"]
    benchmarks += [f"| {name} | {b.group} | {b.metric} | {b.max_tiles} |" for name, b in BENCHMARKS.items()]
    rules = ["## Rules on the whole run", "", *(f"- {rule['message']}" for rule in (*STAGES, *RUN))]
    structs = dict.fromkeys(itertools.chain(_reachable(Spec), _reachable(Status)))
    tables = [line for struct in structs for line in (*_describe_struct(struct), "")]
    return "\n".join([_INTRODUCTION, *tables, *rules, "", *benchmarks, ""])


def _reachable(struct: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """The struct, then those of its fields, in their order."""
    yield struct
    for field in msgspec.structs.fields(struct):
        inner = _struct_of(msgspec.inspect.type_info(field.type))
        if inner is not None:
            yield from _reachable(inner)


def _struct_of(info: Any) -> type[msgspec.Struct] | None:
    """The struct inside a type: its own, or that of its items or values."""
    match info:
        case msgspec.inspect.StructType(cls=cls):
            found: type[msgspec.Struct] = cls
            return found
        case msgspec.inspect.UnionType(types=members):
            return next((s for s in map(_struct_of, members) if s is not None), None)
        case msgspec.inspect.Metadata(type=inner):
            return _struct_of(inner)
        case msgspec.inspect.VarTupleType(item_type=inner) | msgspec.inspect.ListType(item_type=inner):
            return _struct_of(inner)
    return None


def _describe_struct(struct: type[msgspec.Struct]) -> Iterator[str]:
    schema, words = struct_schema(struct), describe_fields(struct)
    yield f"## {struct.__name__}"
    yield ""
    if struct.__doc__:
        yield from (inspect.cleandoc(struct.__doc__), "")
    yield from ("| Field | Type | Default | Description |", "|---|---|---|---|")
    for field in msgspec.structs.fields(struct):
        name = field.encode_name
        property_ = schema["properties"][name]
        cells = (f"`{name}`", _type_of(field, property_), _default_of(field, property_), words.get(field.name, ""))
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
    rules = dict.fromkeys(rule["message"] for rule in RULES.get(struct, []))
    if rules:
        yield from ("", *(f"- {message}" for message in rules))


def _type_of(field: msgspec.structs.FieldInfo, property_: dict[str, Any]) -> str:
    inner = _struct_of(msgspec.inspect.type_info(field.type))
    linked = "" if inner is None else f"[{inner.__name__}](#{inner.__name__.lower()})"
    return _type_words(property_, linked)


def _type_words(schema: dict[str, Any], linked: str) -> str:
    """`linked` stands for the struct inside, if there is one."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema["type"]:
        case "array":
            return f"list of {_type_words(schema['items'], linked)}"
        case "object" if "additionalProperties" in schema:
            return f"map to {_type_words(schema['additionalProperties'], linked)}"
        case "object":
            return linked
        case "integer" if "minimum" in schema:
            return f"integer, {schema['minimum']} to {schema['maximum']}"
    return str(schema["type"])


def _default_of(field: msgspec.structs.FieldInfo, property_: dict[str, Any]) -> str:
    if field.required:
        return "required"
    if "default" in property_:
        return f"`{json.dumps(property_['default'])}`"
    return f"`{json.dumps(field.default)}`" if isinstance(field.default, int) and field.default is not None else ""
