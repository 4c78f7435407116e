"""Enforce the NetworkPolicies of the cluster of this folder: what a network plugin does on real nodes.

All nodes share the host's network, so one process watches pods, namespaces and policies and keeps one nftables table,
through which the packets to pods of all nodes pass. Ingress rules are enforced, egress rules are not. As with most
plugins, connections from a pod's node are admitted, which the kubelet's probes need. Only the standard library is used.

    network_policies.py SERVER PKI     watch the API server as `admin` with the certificates in the folder PKI
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TABLE = "network-policies"
RESOURCES = {
    "pods": "/api/v1/pods",
    "namespaces": "/api/v1/namespaces",
    "networkpolicies": "/apis/networking.k8s.io/v1/networkpolicies",
}
"""Path of each resource that is watched."""
_WATCH_SECONDS = 300
_DEBOUNCE_SECONDS = 0.1

Object = dict[str, Any]


def build_rules(policies: Sequence[Object], pods: Sequence[Object], namespaces: Sequence[Object]) -> str:
    """Build the nftables script that replaces the table: one chain for each pod that a policy isolates."""
    networked = [pod for pod in pods if _has_own_address(pod)]
    labels = {o["metadata"]["name"]: o["metadata"].get("labels", {}) for o in namespaces}
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    jumps = []
    for pod in networked:
        if selecting := [policy for policy in policies if _selects(policy, pod)]:
            address = pod["status"]["podIP"]
            rules = [rule for policy in selecting for rule in _build_accepts(policy, pod, networked, labels)]
            lines += [f"  chain to-{address} {{", *(f"    {rule}" for rule in rules), "    drop", "  }"]
            jumps.append(f"    ip daddr {address} jump to-{address}")
    lines += ["  chain forward {", "    type filter hook forward priority filter; policy accept;"]
    lines += ["    ct state established,related accept", *jumps]
    return "\n".join([*lines, "  }", "}", ""])


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Return whether labels match a LabelSelector; an empty one matches all."""
    operators: dict[str, Callable[[str, list[str]], bool]] = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, _: key in labels,
        "DoesNotExist": lambda key, _: key not in labels,
    }
    expressions = selector.get("matchExpressions", [])
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        operators[e["operator"]](e["key"], e.get("values", [])) for e in expressions
    )


def _has_own_address(pod: Object) -> bool:
    status = pod.get("status", {})
    is_ended = status.get("phase") in ("Succeeded", "Failed")
    return bool(status.get("podIP")) and not is_ended and not pod["spec"].get("hostNetwork")


def _selects(policy: Object, pod: Object) -> bool:
    """Return whether a policy isolates a pod for ingress."""
    spec = policy["spec"]
    is_near = policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
    is_ingress = "Ingress" in spec.get("policyTypes", ["Ingress"])
    return is_near and is_ingress and matches(spec.get("podSelector", {}), pod["metadata"].get("labels", {}))


def _build_accepts(
    policy: Object, pod: Object, pods: Sequence[Object], namespaces: dict[str, dict[str, str]]
) -> Iterator[str]:
    """Yield the nftables rules that a policy admits connections to a pod by."""
    for rule in policy["spec"].get("ingress", []):
        sources = [""]
        if peers := rule.get("from"):
            sources = list(_build_sources(peers, policy["metadata"]["namespace"], pods, namespaces))
        for source in sources:
            for port in _build_ports(rule.get("ports", []), pod):
                yield " ".join(part for part in (source, port, "accept") if part)


def _build_sources(
    peers: Sequence[Object], namespace: str, pods: Sequence[Object], namespaces: dict[str, dict[str, str]]
) -> Iterator[str]:
    """Yield the matches of the source addresses of some NetworkPolicyPeers."""
    addresses = set()
    for peer in peers:
        if block := peer.get("ipBlock"):
            excluded = "".join(f" ip saddr != {cidr}" for cidr in block.get("except", []))
            yield f"ip saddr {block['cidr']}{excluded}"
            continue
        for pod in pods:
            other = pod["metadata"]["namespace"]
            is_selected = (
                matches(peer["namespaceSelector"], namespaces.get(other, {}))
                if "namespaceSelector" in peer
                else other == namespace
            )
            if is_selected and matches(peer.get("podSelector", {}), pod["metadata"].get("labels", {})):
                addresses.add(pod["status"]["podIP"])
    if addresses:
        yield f"ip saddr {{ {', '.join(sorted(addresses))} }}"


def _build_ports(ports: Sequence[Object], pod: Object) -> Iterator[str]:
    """Yield the matches of the ports of a rule; named ports are those of the pod's containers."""
    if not ports:
        yield ""
    for port in ports:
        protocol, number = port.get("protocol", "TCP").lower(), port.get("port", "")
        if isinstance(number, str) and number:
            number = _find_port(pod, number)
            if number is None:
                continue
        end = f"-{port['endPort']}" if "endPort" in port else ""
        yield f"{protocol} dport {number}{end}" if number else f"meta l4proto {protocol}"


def _find_port(pod: Object, name: str) -> int | None:
    ports = (port for container in pod["spec"]["containers"] for port in container.get("ports", []))
    return next((int(port["containerPort"]) for port in ports if port.get("name") == name), None)


class Mirror:
    """The objects of all resources, kept up to date by one thread for each."""

    def __init__(self, server: str, pki: Path) -> None:
        self._address = urlsplit(server)
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._objects: dict[str, dict[str, Object]] = {}
        self.changed = threading.Event()

    def start(self) -> None:
        """Start the threads; they end with the process."""
        for resource in RESOURCES:
            threading.Thread(target=self._follow, args=(resource,), daemon=True).start()

    def list_objects(self, resource: str) -> list[Object]:
        """Return the present objects."""
        return list(self._objects[resource].values())

    def is_synced(self) -> bool:
        """Return whether every resource was listed once."""
        return self._objects.keys() == RESOURCES.keys()

    def _follow(self, resource: str) -> None:
        while True:
            try:
                listed = next(self._get(RESOURCES[resource]))
                self._objects[resource] = {o["metadata"]["uid"]: o for o in listed["items"]}
                self.changed.set()
                version = listed["metadata"]["resourceVersion"]
                query = f"?watch=true&resourceVersion={version}&timeoutSeconds={_WATCH_SECONDS}"
                for event in self._get(RESOURCES[resource] + query):
                    self._handle(resource, event["type"], event["object"])
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                print(f"watch of {resource} failed, resuming: {error!r}", file=sys.stderr, flush=True)
                time.sleep(1)

    def _handle(self, resource: str, type_: str, body: Object) -> None:
        if type_ == "ERROR":
            raise ValueError(body.get("message"))
        objects = dict(self._objects[resource])  # a copy, because the main thread may read the present one
        if type_ == "DELETED":
            objects.pop(body["metadata"]["uid"], None)
        else:
            objects[body["metadata"]["uid"]] = body
        self._objects[resource] = objects
        self.changed.set()

    def _get(self, path: str) -> Iterator[Object]:
        """Yield the JSON documents of a response, one for each line."""
        connection = http.client.HTTPSConnection(
            str(self._address.hostname), self._address.port, context=self._tls, timeout=_WATCH_SECONDS + 30
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ValueError(f"HTTP {response.status}")
            for line in response:
                yield json.loads(line)
        finally:
            connection.close()


def main(server: str, pki: str) -> None:
    """Replace the table whenever a change of the objects changes it."""
    mirror, applied = Mirror(server, Path(pki)), ""
    mirror.start()
    while True:
        mirror.changed.wait()
        time.sleep(_DEBOUNCE_SECONDS)
        mirror.changed.clear()
        if not mirror.is_synced():
            continue
        rules = build_rules(*(mirror.list_objects(name) for name in ("networkpolicies", "pods", "namespaces")))
        if rules != applied:
            done = subprocess.run(["nft", "-f", "-"], input=rules, text=True, capture_output=True, check=False)
            applied = rules if done.returncode == 0 else ""
            print(done.stderr or f"applied {rules.count('chain to-')} chains", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
