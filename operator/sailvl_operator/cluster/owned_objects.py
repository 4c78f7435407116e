"""The owned objects of all runs: one store for each kind, filled by informers and read by the controller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sailvl_operator.cluster import resources
from sailvl_operator.cluster.background import CountError, ignore_count, keep_running
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.informer import Informer
from sailvl_operator.cluster.parse import (
    is_routine_job,
    is_routine_pod,
    parse_job,
    parse_network_policy,
    parse_pod,
    parse_service,
    stamp_job,
    stamp_pod,
)
from sailvl_operator.cluster.record_store import Kind, Record, Store, mark_gone
from sailvl_operator.cluster.runs import RunEntry, RunKey
from sailvl_operator.core.observe import JobRecord, NetworkPolicyRecord, PodRecord, ServiceRecord
from sailvl_operator.core.ownership import is_job_evidence, is_pod_evidence

_JOBS: Kind[JobRecord] = Kind(
    resource=resources.JOBS,
    decode_as=resources.Job,
    parse=parse_job,
    mark_gone=mark_gone,
    get_place=lambda job: (job.stage, job.attempt),
    stamp=stamp_job,
    is_routine=is_routine_job,
)
_SERVICES: Kind[ServiceRecord] = Kind(
    resource=resources.SERVICES, decode_as=resources.Service, parse=parse_service, is_routine=lambda _: True
)
_PODS: Kind[PodRecord] = Kind(
    resource=resources.PODS,
    decode_as=resources.Pod,
    parse=parse_pod,
    mark_gone=mark_gone,
    get_place=lambda pod: (pod.stage, pod.attempt, pod.index),
    max_gone=2,  # the Job controller may create a pod twice and delete one of the two
    stamp=stamp_pod,
    is_routine=is_routine_pod,
)


def _build_network_policy_kind(metrics_peers: Sequence[dict[str, Any]]) -> Kind[NetworkPolicyRecord]:
    return Kind(
        resource=resources.NETWORK_POLICIES,
        decode_as=resources.NetworkPolicy,
        parse=partial(parse_network_policy, metrics_peers=metrics_peers),
        is_routine=lambda policy: policy.is_current,
    )


class OwnedObjects:
    """A store for each kind of owned object, and the informers that fill them."""

    def __init__(
        self,
        client: Client,
        *,
        namespaces: Sequence[str],
        on_change: Callable[[RunKey], None],
        count_restart: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
        on_routine_change: Callable[[RunKey], None] | None = None,
        metrics_peers: Sequence[dict[str, Any]] = (),
        count_error: CountError = ignore_count,
        find_run: Callable[[RunKey], RunEntry | None] | None = None,
    ) -> None:
        """Create the stores and informers.

        `namespaces` are those to watch; none means all. `on_change` receives the key of a run whose objects have
        changed; `on_routine_change` is called instead for changes that need no action. `count_restart` receives the
        resource and the reason whenever a watch is restarted, and `count_error` the name of an informer with an
        unexpected error. `metrics_peers` are those of the NetworkPolicies to be. `find_run` returns an unfinished run,
        whose deleted objects may be kept; without it, those of all are.
        """
        self._find_run = find_run
        policies = _build_network_policy_kind(metrics_peers)
        self.jobs: Store[JobRecord] = Store(
            _JOBS, on_change, clock, on_routine_change=on_routine_change, is_evidence=self._is_job_evidence
        )
        self.pods: Store[PodRecord] = Store(
            _PODS, on_change, clock, on_routine_change=on_routine_change, is_evidence=self._is_pod_evidence
        )
        self.services: Store[ServiceRecord] = Store(_SERVICES, on_change, clock, on_routine_change=on_routine_change)
        self.network_policies: Store[NetworkPolicyRecord] = Store(
            policies, on_change, clock, on_routine_change=on_routine_change
        )

        def watch(kind: Kind[Record], store: Store[Record]) -> list[Informer[Any]]:
            scopes = namespaces or ("",)
            return [
                Informer(client, kind, store, namespace=scope, count_restart=count_restart, count_error=count_error)
                for scope in scopes
            ]

        self._count_error = count_error
        self._required = [*watch(_JOBS, self.jobs), *watch(_PODS, self.pods)]
        self._informers = [
            *self._required,
            *watch(_SERVICES, self.services),
            *watch(policies, self.network_policies),
        ]

    async def run(self) -> None:
        """Run the informers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers:
                name = f"informer-{informer.resource}"
                group.create_task(keep_running(name, informer.run, self._count_error), name=name)

    def retain_deleted(self) -> None:
        """Keep the last state of deleted Jobs and pods from now on, until it is forgotten. Called by the leading
        replica only, since a standby would never forget it."""
        self.jobs.retains_deleted = self.pods.retains_deleted = True

    def _is_job_evidence(self, job: JobRecord) -> bool:
        if self._find_run is None:
            return True
        entry = self._find_run((job.namespace, job.run))
        return entry is not None and is_job_evidence(entry.run, entry.planned, job)

    def _is_pod_evidence(self, pod: PodRecord) -> bool:
        if self._find_run is None:
            return True
        key = pod.namespace, pod.run
        entry = self._find_run(key)
        return entry is not None and is_pod_evidence(entry.run, entry.planned, self.jobs.get(key), pod)

    async def wait_synced(self) -> None:
        """Wait until every informer has its first list, or may have none; before that, a missing Job doesn't mean that
        it was deleted."""
        for informer in self._informers:
            await informer.answered.wait()

    def is_synced(self) -> bool:
        """Return whether every informer has its first list, or is forbidden to list."""
        return all(informer.answered.is_set() for informer in self._informers)

    def find_missing_permissions(self, namespace: str | None = None) -> list[str]:
        """Return which permissions on Jobs and pods are missing, without which no run of a namespace can be reconciled.
        None: of any namespace.

        Runs continue without a watch of Services or NetworkPolicies: each is created when it is needed.
        """
        return [
            informer.missing_permission
            for informer in self._required
            if informer.missing_permission and (namespace is None or informer.namespace in ("", namespace))
        ]

    def ages(self) -> Iterator[tuple[str, float]]:
        """Yield each resource with the longest silence of its watches in seconds."""
        oldest: dict[str, float] = {}
        for informer in self._informers:
            oldest[informer.resource] = max(informer.silent_seconds(), oldest.get(informer.resource, 0.0))
        yield from oldest.items()
