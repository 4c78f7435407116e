"""NetworkPolicyPeers of the installation: who may connect to the metrics port of workers, besides the operator.

They are checked as the API server checks them. It would otherwise reject the NetworkPolicy of every run, and no worker
starts without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from sailvl_operator.api.scalars import Struct, is_label_key, is_label_value


class Requirement(Struct, frozen=True, kw_only=True):
    """LabelSelectorRequirement."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_label_key(self.key)
        _check_label_values(self.values)
        if bool(self.values) != (self.operator in ("In", "NotIn")):
            raise ValueError(f"{self.operator} needs {'no' if self.values else 'some'} values")


class LabelSelector(Struct, frozen=True, kw_only=True):
    """LabelSelector; an empty one selects everything."""

    match_labels: dict[str, str] = msgspec.field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        for key in self.match_labels:
            _check_label_key(key)
        _check_label_values(self.match_labels.values())


class IpBlock(Struct, frozen=True, kw_only=True):
    """IPBlock: the addresses of a CIDR, without those of others within it."""

    cidr: str
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")

    def __post_init__(self) -> None:
        block = _parse_cidr(self.cidr)
        for text in self.except_:
            excluded = _parse_cidr(text)
            if excluded.version != block.version or excluded == block or not _is_within(excluded, block):
                raise ValueError(f"except {text} is not a part of the CIDR {self.cidr}")


class Peer(Struct, frozen=True, kw_only=True):
    """NetworkPolicyPeer: pods by labels of themselves and of their namespace, or addresses."""

    pod_selector: LabelSelector | UnsetType = UNSET
    namespace_selector: LabelSelector | UnsetType = UNSET
    ip_block: IpBlock | UnsetType = UNSET

    def __post_init__(self) -> None:
        has_selector = self.pod_selector is not UNSET or self.namespace_selector is not UNSET
        if has_selector == (self.ip_block is not UNSET):
            raise ValueError("a peer needs either ipBlock, or podSelector, namespaceSelector or both")


def parse_peers(text: str) -> tuple[dict[str, Any], ...]:
    """Parse a JSON list of NetworkPolicyPeers. Empty fields of their selectors are removed, as the API server does.

    Raises ValueError with what to set.
    """
    try:
        peers = msgspec.json.decode(text, type=list[Peer])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"a JSON list of NetworkPolicyPeers: {error}") from error
    return tuple(msgspec.json.decode(msgspec.json.encode(peers)))


def _check_label_key(key: str) -> None:
    if not is_label_key(key):
        raise ValueError(f"{key!r} is not a key of a label")


def _check_label_values(values: Iterable[str]) -> None:
    for value in values:
        if not is_label_value(value):
            raise ValueError(f"{value!r} is not a value of a label")


def _parse_cidr(text: str) -> IPv4Network | IPv6Network:
    if re.search(r"/[0-9]{1,3}$", text) is None:
        raise ValueError(f"{text!r} is not a CIDR such as 10.0.0.0/8")
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a CIDR such as 10.0.0.0/8") from error


def _is_within(inner: IPv4Network | IPv6Network, outer: IPv4Network | IPv6Network) -> bool:
    return inner.prefixlen >= outer.prefixlen and inner.network_address in outer
