"""Choose the pods whose progress may be read: first workers of running attempts, at an address that pods may have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.runs import RunKey, RunStore
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.core.ownership import select_pods

_BROADCAST = ip_address("255.255.255.255")


def find_readable(owned_objects: OwnedObjects, runs: RunStore) -> Iterator[PodRecord]:
    """Yield the pods that can be read. Those that other clients created with a run's labels are left out."""
    readable: dict[RunKey, list[PodRecord]] = defaultdict(list)
    for pod in owned_objects.pods:
        if is_readable(pod):
            readable[pod.namespace, pod.run].append(pod)
    for key, pods in readable.items():
        entry = runs.get_unfinished(key)
        if entry is not None:
            yield from select_pods(entry.run, owned_objects.jobs.get(key), pods)


def is_readable(pod: PodRecord) -> bool:
    """Whether a pod is the first worker of an attempt and runs."""
    is_running = pod.phase == "Running" and not (pod.is_gone or pod.is_deleting)
    return is_running and pod.index == 0 and bool(pod.ip)


def is_worker_address(ip: str) -> bool:
    """Whether a worker may have this address.

    A client that may write the status of pods could otherwise point the operator at its own loopback interface, or at
    the metadata service of the cloud, which has a link-local address.
    """
    try:
        address = ip_address(ip)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    is_special = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified
    return not is_special and address != _BROADCAST
