"""NetworkPolicyPeers of the installation: which the API server would take, and what they become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sailvl_operator.api.network_peers import parse_peers


def expression(**fields: Any) -> dict[str, Any]:
    return {"podSelector": {"matchExpressions": [{"key": "app", **fields}]}}


def block(cidr: str, *excluded: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": cidr, "except": list(excluded)}}


def labels(**matched: Any) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": matched}}


@pytest.mark.parametrize(
    "peer",
    [
        labels(app="prometheus"),
        labels(**{"app.kubernetes.io/name": "", "x": "A.b_c-1"}),
        {"podSelector": {}, "namespaceSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
        expression(operator="In", values=["a", "b"]),
        expression(operator="DoesNotExist"),
        {"ipBlock": {"cidr": "10.0.0.7/32"}},
        block("10.0.0.0/8", "10.1.0.0/16", "10.2.3.4/32"),
        block("fd00::/8", "fd00:1::/32"),
    ],
    ids=json.dumps,
)
def test_peer_of_the_api_is_taken_as_it_is(peer: dict[str, Any]) -> None:
    assert parse_peers(json.dumps([peer])) == (peer,)


def test_empty_fields_are_removed_as_the_api_server_removes_them() -> None:
    given = [{"podSelector": {"matchLabels": {}, "matchExpressions": []}}, block("10.0.0.0/8")]
    given.append(expression(operator="Exists", values=[]))
    assert parse_peers(json.dumps(given)) == (
        {"podSelector": {}},
        {"ipBlock": {"cidr": "10.0.0.0/8"}},
        expression(operator="Exists"),
    )


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ({}, "a peer needs either ipBlock, or podSelector, namespaceSelector or both"),
        (block("10.0.0.0/8") | {"podSelector": {}}, "a peer needs either ipBlock, or podSelector"),
        ({"podSelector": None}, "Expected `object`, got `null` - at `$[0].podSelector`"),
        ({"podSelector": {}, "ports": [{"port": 9400}]}, "unknown field `ports`"),
        ({"podSelector": {"app": "prometheus"}}, "unknown field `app`"),
        (block("10.0.0.0"), "'10.0.0.0' is not a CIDR such as 10.0.0.0/8"),
        (block("10.0.0.0/33"), "'10.0.0.0/33' is not a CIDR"),
        (block("10.0.0.0/255.0.0.0"), "is not a CIDR"),
        (block("10.0.0.0/8\n"), "is not a CIDR"),
        (block("prometheus/8"), "is not a CIDR"),
        (block("10.0.0.0/8", "11.0.0.0/16"), "except 11.0.0.0/16 is not a part of the CIDR 10.0.0.0/8"),
        (block("10.0.0.0/8", "10.0.0.0/8"), "is not a part"),
        (block("10.1.0.0/16", "10.0.0.0/8"), "is not a part"),
        (block("10.0.0.0/8", "fd00::/16"), "is not a part"),
        (labels(app=1), "Expected `str`, got `int`"),
        (labels(app="a b"), "'a b' is not a value of a label"),
        (labels(app="a\n"), "is not a value of a label"),
        (labels(app="a" * 64), "is not a value of a label"),
        (labels(**{"a b": ""}), "'a b' is not a key of a label"),
        (labels(**{"a/b/c": ""}), "'a/b/c' is not a key of a label"),
        (labels(**{"/a": ""}), "'/a' is not a key of a label"),
        (labels(**{"A.B/c": ""}), "is not a key of a label"),
        (labels(**{"a" * 64: ""}), "is not a key of a label"),
        (expression(operator="In"), "In needs some values"),
        (expression(operator="Exists", values=["a"]), "Exists needs no values"),
        (expression(operator="Equals", values=["a"]), "Invalid enum value 'Equals'"),
        (expression(operator="In", values=["a b"]), "is not a value of a label"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_peer_that_the_api_server_rejects_is_refused(peer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^a JSON list of NetworkPolicyPeers: ") as error:
        parse_peers(json.dumps([peer]))
    assert message in str(error.value)
