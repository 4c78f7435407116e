"""Builds the CustomResourceDefinition from the types: a structural schema with descriptions, defaults and CEL rules."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import UNSET

from sailvl_operator.api import names
from sailvl_operator.api.rules import RULES, RUN, STAGES
from sailvl_operator.api.scalars import BY_NAME, Struct
from sailvl_operator.api.status import Status
from sailvl_operator.api.types import Spec

NAME = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 40, "pattern": names.NAME_PATTERN}}}

COLUMNS = (
    ("Stage", ".status.summary.stage"),
    ("Progress", ".status.summary.progress"),
    ("Ready", ".status.summary.ready"),
    ("Restarts", ".status.summary.restarts"),
    ("Goodput", ".status.summary.goodput"),
    ("ETA", ".status.summary.eta"),
    ("Reason", ".status.summary.reason"),
)


def build_crd() -> dict[str, Any]:
    """Build the manifest of the CustomResourceDefinition."""
    columns = [
        {"name": name, "type": "integer" if name == "Restarts" else "string", "jsonPath": path}
        for name, path in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {"kind": names.KIND, "plural": names.PLURAL, "singular": "sailvlrun", "shortNames": ["svr"]},
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        *columns,
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                    ],
                    "schema": {"openAPIV3Schema": build_schema()},
                }
            ],
        },
    }


@cache
def build_schema() -> dict[str, Any]:
    """Build the schema of the whole object."""
    spec = struct_schema(Spec)
    spec["properties"]["stages"]["x-kubernetes-validations"] = STAGES
    status = struct_schema(Status)
    status["properties"]["stages"] |= BY_NAME
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return {
        "type": "object",
        "description": "Recipe that trains one SAIL-VL model: data curation, pretraining, fine-tuning and evaluation.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": NAME,
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": RUN,
    }


def struct_schema(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Build the schema of a struct. Fields keep their order, and their docstrings become descriptions."""
    fields = msgspec.structs.fields(struct)
    descriptions = describe_fields(struct)
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    if struct.__doc__:
        schema["description"] = unwrap(struct.__doc__)
    required = [field.encode_name for field in fields if field.required]
    if required:
        schema["required"] = required
    for field in fields:
        property_ = _type_schema(msgspec.inspect.type_info(field.type))
        if field.name in descriptions:
            property_["description"] = descriptions[field.name]
        if issubclass(struct, Struct):
            property_ |= _default(field)
        schema["properties"][field.encode_name] = property_
    if struct in RULES:
        schema["x-kubernetes-validations"] = RULES[struct]
    return schema


def _default(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """Return the default that the API server fills in. Structs get none: the defaults of their fields apply."""
    value = field.default
    if value is msgspec.NODEFAULT or value is UNSET or value is None or isinstance(value, msgspec.Struct):
        return {}
    plain = list(value) if isinstance(value, tuple) else value
    return {} if plain in ("", [], {}) else {"default": plain}


def _type_schema(info: msgspec.inspect.Type) -> dict[str, Any]:  # noqa: C901, PLR0911  # a table of types
    """Build the structural schema of a msgspec type. Raises TypeError for a type that has none."""
    match info:
        case msgspec.inspect.UnionType(types=members):
            (known,) = (m for m in members if not isinstance(m, msgspec.inspect.NoneType))
            return _type_schema(known)
        case msgspec.inspect.Metadata(type=inner, extra_json_schema=extra):
            return _type_schema(inner) | (extra or {})
        case msgspec.inspect.StructType(cls=cls):
            return struct_schema(cls)
        case msgspec.inspect.LiteralType(values=values):
            return {"type": "string", "enum": list(values)}
        case msgspec.inspect.BoolType():
            return {"type": "boolean"}
        case msgspec.inspect.IntType(ge=ge, le=le):
            return {"type": "integer", "format": "int64"} | _drop_unset(minimum=ge, maximum=le)
        case msgspec.inspect.StrType(min_length=low, max_length=high, pattern=pattern):
            return {"type": "string"} | _drop_unset(minLength=low, maxLength=high, pattern=pattern)
        case msgspec.inspect.DictType(value_type=value, max_length=high):
            return {"type": "object", "additionalProperties": _type_schema(value)} | _drop_unset(maxProperties=high)
        case msgspec.inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            return {"type": "array", "items": _type_schema(item)} | _drop_unset(minItems=low, maxItems=high)
        case msgspec.inspect.ListType(item_type=item, min_length=low, max_length=high):
            return {"type": "array", "items": _type_schema(item)} | _drop_unset(minItems=low, maxItems=high)
    raise TypeError(f"no schema for {info}")


def _drop_unset(**limits: Any) -> dict[str, Any]:
    return {name: limit for name, limit in limits.items() if limit is not None}


@cache
def describe_fields(struct: type) -> dict[str, str]:
    """Return the docstring of each field, including inherited fields, by name."""
    descriptions: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base.__module__.startswith("sailvl_operator"):
            tree = ast.parse(inspect.getsource(sys.modules[base.__module__]))
            body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == base.__name__)
            descriptions |= dict(_field_docstrings(body))
    return descriptions


def unwrap(docstring: str) -> str:
    """Return a docstring with each paragraph on one line, since readers of the schema wrap lines themselves."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


def _field_docstrings(body: list[ast.stmt]) -> list[tuple[str, str]]:
    """Return the (field, docstring) pairs of a class body."""
    return [
        (node.target.id, unwrap(after.value.value))
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    ]
