"""Constrained strings, numbers and lists from which the types of the spec are built, and hints for their patterns."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sailvl_operator.api import names

SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}
"""Schema extension of a list without duplicate items."""
BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
"""Schema extension of a list whose items are identified by their name."""

COUNT = r"^([1-9][0-9]{0,14}|[1-9][0-9]{0,5}(\.[0-9]+)?[KMBT]|0\.[0-9]{0,2}[1-9][0-9]*[KMBT])$"
DECIMAL = r"^[0-9]+(\.[0-9]+)?(e-?[0-9]{1,2})?$"
QUANTITY = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
ABSOLUTE = r"^/[^\x00-\x1f\x7f]*$"
VARIABLE = "^[A-Za-z_][-A-Za-z0-9_.]*$"
SERVER = r"^https?://([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^ \x00-\x1f\x7f]*)?$"
IMAGE = r"^[!-~]*$"
NO_SPACE = r"^[^ \x00-\x1f\x7f]*$"

_LABEL_NAME = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_MAX_LABEL_LENGTH = 63
_MAX_PREFIX_LENGTH = 253

HINTS = {
    COUNT: 'a count of at least 1 as a string, at most 999999T: "4096", "32K", "1.5M", "131B"',
    DECIMAL: 'a decimal number as a string: "2e-4", "0.05"',
    QUANTITY: 'a quantity as a string: "500m", "4", "64Gi"',
    SUBDOMAIN: "lower-case letters, digits, - and .",
    LABEL_VALUE: "letters, digits, -, _ and .",
    names.NAME_PATTERN: "lower-case letters, digits and -, beginning with a letter",
    ABSOLUTE: "an absolute path, as in /data/raw/images: /data is the storage",
    VARIABLE: "a variable's name",
    SERVER: "an http:// or https:// address without a user name, as in http://judge.team.svc:8000/v1",
    IMAGE: "letters, digits and punctuation of ASCII, without spaces",
    NO_SPACE: "no spaces or control characters",
}
"""Human-readable hint for each pattern, appended to the errors of `sailvl validate`."""

Name = Annotated[str, Meta(min_length=1, max_length=30, pattern=names.NAME_PATTERN)]
Path = Annotated[str, Meta(min_length=1, max_length=512, pattern=ABSOLUTE)]
Weights = Annotated[str, Meta(min_length=1, max_length=512, pattern=NO_SPACE)]
"""Model weights: a directory on the storage (/data/models/x) or a Hugging Face Hub ID (owner/name)."""
Count = Annotated[str, Meta(max_length=16, pattern=COUNT)]
"""Large count with an optional suffix: 4096, 32K, 1.5M, 131B, 2T."""
Decimal = Annotated[str, Meta(max_length=16, pattern=DECIMAL)]
"""Decimal number as a string: "2e-4", "0.05"."""
Seconds = Annotated[int, Meta(ge=0, le=31_536_000)]
ObjectName = Annotated[str, Meta(min_length=1, max_length=253, pattern=SUBDOMAIN)]
LabelValue = Annotated[str, Meta(max_length=63, pattern=LABEL_VALUE)]
Quantity = Annotated[str, Meta(max_length=32, pattern=QUANTITY)]
Labels = Annotated[dict[str, LabelValue], Meta(max_length=16)]
Server = Annotated[str, Meta(max_length=512, pattern=SERVER)]
Part = Literal["vision", "connector", "language"]
Parts = Annotated[tuple[Part, ...], Meta(min_length=1, max_length=3, extra_json_schema=SET)]


class Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """Base of the spec types: camelCase in JSON; unknown fields are an error."""


def is_label_key(key: str) -> bool:
    """Return whether a label or a taint may have this key: a name, with or without a prefix such as nvidia.com/."""
    prefix, slash, name = key.rpartition("/")
    is_prefix = len(prefix) <= _MAX_PREFIX_LENGTH and re.fullmatch(SUBDOMAIN, prefix) is not None
    is_name = len(name) <= _MAX_LABEL_LENGTH and re.fullmatch(_LABEL_NAME, name) is not None
    return is_name and (is_prefix or not slash)


def is_label_value(value: str) -> bool:
    """Return whether a label may have this value."""
    return len(value) <= _MAX_LABEL_LENGTH and re.fullmatch(LABEL_VALUE, value) is not None
