"""The nftables rules by which the cluster of `make cluster` enforces NetworkPolicies."""

from __future__ import annotations

from typing import Any

import pytest

from hack.cluster.network_policies import build_rules, matches

NAMESPACES = [
    {"metadata": {"name": "team", "labels": {"kubernetes.io/metadata.name": "team"}}},
    {"metadata": {"name": "other", "labels": {"kubernetes.io/metadata.name": "other", "tier": "x"}}},
]


def build_pod(namespace: str, address: str, phase: str = "Running", **labels: str) -> dict[str, Any]:
    ports = [{"name": "metrics", "containerPort": 9400}]
    return {
        "metadata": {"namespace": namespace, "labels": labels},
        "spec": {"containers": [{"ports": ports}]},
        "status": {"podIP": address, "phase": phase},
    }


PODS = [
    build_pod("team", "10.0.0.1", app="worker"),
    build_pod("team", "10.0.0.2", app="worker"),
    build_pod("team", "10.0.0.3"),
    build_pod("other", "10.0.0.4", app="prometheus"),
    build_pod("other", "10.0.0.5", app="worker"),
    build_pod("team", "10.0.0.6", "Succeeded", app="worker"),
]


def build_policy(*ingress: dict[str, Any], **spec: Any) -> dict[str, Any]:
    selector = {"matchLabels": {"app": "worker"}}
    body = {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": list(ingress)} | spec
    return {"metadata": {"namespace": "team"}, "spec": body}


def list_chains(*policies: dict[str, Any], pods: list[dict[str, Any]] = PODS) -> dict[str, list[str]]:
    """Return the rules of the chain of each isolated pod, without the final drop."""
    chains: dict[str, list[str]] = {}
    lines = [line.strip() for line in build_rules(policies, pods, NAMESPACES).splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("chain to-"):
            end = lines.index("}", number)
            assert lines[end - 1] == "drop"
            chains[line.split()[1].removeprefix("to-")] = lines[number + 1 : end - 1]
    return chains


def test_script_replaces_the_whole_table() -> None:
    policy = build_policy({"from": [{"podSelector": {}}], "ports": [{"port": 9400, "protocol": "TCP"}]})
    assert build_rules([policy], PODS[:1], NAMESPACES) == (
        "table inet network-policies\n"
        "delete table inet network-policies\n"
        "table inet network-policies {\n"
        "  chain to-10.0.0.1 {\n"
        "    ip saddr { 10.0.0.1 } tcp dport 9400 accept\n"
        "    drop\n"
        "  }\n"
        "  chain forward {\n"
        "    type filter hook forward priority filter; policy accept;\n"
        "    ct state established,related accept\n"
        "    ip daddr 10.0.0.1 jump to-10.0.0.1\n"
        "  }\n"
        "}\n"
    )


def test_only_running_pods_that_a_policy_of_their_namespace_selects_are_isolated() -> None:
    assert list_chains(build_policy()).keys() == {"10.0.0.1", "10.0.0.2"}
    assert list_chains() == {}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param({}, ["accept"], id="anyone"),
        pytest.param({"from": []}, ["accept"], id="empty list of peers admits anyone"),
        pytest.param({"from": [{"podSelector": {"matchLabels": {"app": "none"}}}]}, [], id="no pod is selected"),
        pytest.param(
            {"from": [{"podSelector": {"matchLabels": {"app": "worker"}}}]},
            ["ip saddr { 10.0.0.1, 10.0.0.2 } accept"],
            id="pods of the same namespace",
        ),
        pytest.param(
            {"from": [{"namespaceSelector": {"matchLabels": {"tier": "x"}}, "podSelector": {}}]},
            ["ip saddr { 10.0.0.4, 10.0.0.5 } accept"],
            id="all pods of another namespace",
        ),
        pytest.param(
            {
                "from": [
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}},
                    {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.1/32"]}},
                ],
                "ports": [{"port": "metrics"}, {"port": 80, "endPort": 90, "protocol": "UDP"}, {"port": "unknown"}],
            },
            [
                "ip saddr 192.0.2.0/24 ip saddr != 192.0.2.1/32 tcp dport 9400 accept",
                "ip saddr 192.0.2.0/24 ip saddr != 192.0.2.1/32 udp dport 80-90 accept",
                "ip saddr { 10.0.0.4 } tcp dport 9400 accept",
                "ip saddr { 10.0.0.4 } udp dport 80-90 accept",
            ],
            id="several peers and ports",
        ),
    ],
)
def test_rule_admits_its_peers(rule: dict[str, Any], expected: list[str]) -> None:
    assert list_chains(build_policy(rule))["10.0.0.1"] == expected


def test_policies_add_to_each_other() -> None:
    first, second = build_policy({"ports": [{"port": 1}]}), build_policy({"ports": [{"port": 2}]})
    assert list_chains(first, second)["10.0.0.1"] == ["tcp dport 1 accept", "tcp dport 2 accept"]


def test_policy_for_egress_isolates_no_pod() -> None:
    assert list_chains(build_policy(policyTypes=["Egress"])) == {}


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [
        ("In", ["b"], True),
        ("In", ["c"], False),
        ("NotIn", ["b"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_selector_with_expressions(operator: str, values: list[str], expected: bool) -> None:
    selector = {"matchExpressions": [{"key": "a", "operator": operator, "values": values}]}
    assert matches(selector, {"a": "b"}) is expected
