"""Apply the writes of a decision to the objects that a run owns; applying a decision twice is harmless.

Writes that the API server refuses are kept until a later reconcile succeeds, since they explain why a run is stuck.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.status import Reason
from sailvl_operator.api.types import Run
from sailvl_operator.cluster import resources
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.merge_patch import build_merge_patch
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.parse import decode_policy_spec, parse_job
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.decision import AttemptSpec, Decision, DeletionMode, NetworkPolicyAction
from sailvl_operator.core.desired.manifests import build_claim, build_job, build_service
from sailvl_operator.core.desired.network_policy import build_network_policy
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.observe import AttemptKey, JobRecord, Obstacle
from sailvl_operator.errors import REFUSALS, Conflict, NameConflict, NotFound, OperatorError

_FORCE_GRACE_SECONDS = 1
"""Grace period of the pods of a dead attempt; its hung ranks would hold their GPUs for the whole one."""
_MAX_PREPARED_RUNS = 10_000
"""Runs whose claim is known to exist; the oldest are forgotten first."""

Refusals = dict[AttemptKey, OperatorError]
"""Errors with which the API server refused the objects of attempts."""


class RefusalLog:
    """Newest refusals by run and attempt, as the Stuck condition shows them.

    The controller writes them, and removes them when all writes of a reconcile have succeeded.
    """

    def __init__(self) -> None:
        self._obstacles: dict[RunKey, dict[AttemptKey, Obstacle]] = {}

    def get(self, key: RunKey) -> Mapping[AttemptKey, Obstacle]:
        """Return the refusals of each attempt of a run."""
        return self._obstacles.get(key, {})

    def replace(self, key: RunKey, errors: Mapping[AttemptKey, OperatorError]) -> None:
        """Store the refusals of a reconcile in place of earlier ones."""
        self._obstacles[key] = {attempt: _build_obstacle(error) for attempt, error in errors.items()}

    def clear(self, key: RunKey) -> None:
        """Remove the refusals of a run."""
        self._obstacles.pop(key, None)


def _build_obstacle(error: OperatorError) -> Obstacle:
    return Obstacle(message=str(error), reason=Reason.NAME_CONFLICT if isinstance(error, NameConflict) else None)


class Applier:
    """Writes through the client and puts what it has created into the stores at once.

    `metrics_peers`: NetworkPolicyPeers that may connect to the metrics port of workers.
    """

    def __init__(
        self, client: Client, owned_objects: OwnedObjects, *, metrics_peers: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._client = client
        self._owned_objects = owned_objects
        self._metrics_peers = metrics_peers
        self._prepared: dict[str, None] = {}  # UIDs of runs whose claim exists, oldest first

    async def apply(self, run: Run, decision: Decision) -> Refusals:
        """Apply everything but the Service and the status, and return the starts that were refused.

        A refused start doesn't hold up the other writes, which may even make room for it. A dead attempt is deleted
        only after the next one was started. Raises ApiError or NameConflict; the writes made until then remain, and the
        next reconcile continues from there.
        """
        await self._delete_by_force(decision.get_deleted_jobs(DeletionMode.BEFORE_STARTS))
        refusals = await self._start_all(run, decision)
        await self._delete_by_force(decision.get_deleted_jobs(DeletionMode.FORCE))
        for job, is_suspended in decision.suspend:
            await self._set_suspend(job, is_suspended)
        for job in decision.get_deleted_jobs(DeletionMode.GRACEFUL):
            await self._delete(resources.JOBS, job.namespace, job.name, job.uid)
        if decision.clear_restart_request:
            await self._clear_restart_annotation(run)
        if decision.delete_run:
            await self._delete(resources.RUNS, run.namespace, run.name, run.uid, version=run.resource_version)
        elif decision.network_policy is not None and not (decision.start and _is_needed(decision.network_policy)):
            await self._apply_network_policy(run, decision.network_policy)
        return refusals

    async def ensure_service(self, run: Run, _: Decision) -> Refusals:
        """Create the Service that gives the workers their DNS names; they need it only once their programs are loaded.

        Raises ApiError or NameConflict.
        """
        service = build_service(namespace=run.namespace, run=run.name, owner_uid=run.uid)
        self._owned_objects.services.put_created(
            await self._create(resources.SERVICES, service, run.uid, resources.Service)
        )
        return {}

    async def _start_all(self, run: Run, decision: Decision) -> Refusals:
        """Start attempts. No worker starts without its NetworkPolicy, which is written first."""
        refusals: Refusals = {}
        is_protected = not _is_needed(decision.network_policy)
        for attempt in decision.start:
            try:
                if decision.network_policy is not None and not is_protected:
                    await self._apply_network_policy(run, decision.network_policy)
                    is_protected = True
                await self._ensure_claim(run)
                await self._start(attempt)
            except REFUSALS as error:
                refusals[attempt.document.stage, attempt.document.attempt] = error
        return refusals

    async def _delete_by_force(self, jobs: Iterable[JobRecord]) -> None:
        for job in jobs:
            selector = f"{names.MANAGED_SELECTOR},{names.LABEL_JOB_NAME}={job.name}"
            await self._client.delete_collection(
                resources.PODS, job.namespace, selector=selector, grace_seconds=_FORCE_GRACE_SECONDS
            )
            if job.uid:
                await self._delete(resources.JOBS, job.namespace, job.name, job.uid)

    async def _delete(self, resource: Resource, namespace: str, name: str, uid: str, *, version: str = "") -> None:
        try:
            await self._client.delete(resource, namespace, name, uid=uid, version=version)
        except (NotFound, Conflict):
            return  # the object is gone or has changed, or another object has its name

    async def _clear_restart_annotation(self, run: Run) -> None:
        """Remove the annotation, unless it has a newer value: that would have changed the resourceVersion."""
        guard = {"uid": run.uid, "resourceVersion": run.resource_version}
        body = {"metadata": guard | {"annotations": {names.ANNOTATION_RESTART: None}}}
        await self._client.patch(resources.RUNS, run.namespace, run.name, body, decode_as=resources.Ignored)

    async def _set_suspend(self, job: JobRecord, is_suspended: bool) -> None:
        labels = {names.LABEL_SUSPENDED: "true" if is_suspended else None}
        body = {"metadata": {"uid": job.uid, "labels": labels}, "spec": {"suspend": is_suspended}}
        patched = await self._client.patch(resources.JOBS, job.namespace, job.name, body, decode_as=resources.Job)
        self._owned_objects.jobs.put(patched)

    async def _ensure_claim(self, run: Run) -> None:
        """Create the run's claim; each process does so once for a run."""
        if run.uid in self._prepared:
            return
        claim = build_claim(run)
        if claim is not None:
            await self._create(resources.CLAIMS, claim, run.uid, resources.PersistentVolumeClaim)
        self._prepared[run.uid] = None
        if len(self._prepared) > _MAX_PREPARED_RUNS:
            del self._prepared[next(iter(self._prepared))]

    async def _apply_network_policy(self, run: Run, action: NetworkPolicyAction) -> None:
        """Create, update or delete the run's NetworkPolicy. An update restores the labels and the whole spec."""
        store = self._owned_objects.network_policies
        if action is NetworkPolicyAction.DELETE:
            for record in store.get((run.namespace, run.name)):
                if record.owner_uid == run.uid and record.name == names.network_policy_name(run.name):
                    await self._delete(resources.NETWORK_POLICIES, record.namespace, record.name, record.uid)
            return
        body = build_network_policy(
            namespace=run.namespace, run=run.name, owner_uid=run.uid, metrics_peers=self._metrics_peers
        )
        if action is NetworkPolicyAction.CREATE:
            found = await self._create(resources.NETWORK_POLICIES, body, run.uid, resources.NetworkPolicy)
        else:
            found = await self._get_owned(resources.NETWORK_POLICIES, body, run.uid, resources.NetworkPolicy)
        spec = decode_policy_spec(found, body["spec"])
        if spec is None:
            found, spec = await self._replace_policy(found, body), body["spec"]
        store.put_created(found)
        if patch := _build_policy_patch(found, spec, body):
            name = body["metadata"]["name"]
            store.put(
                await self._client.patch(
                    resources.NETWORK_POLICIES, run.namespace, name, patch, decode_as=resources.NetworkPolicy
                )
            )

    async def _replace_policy(self, found: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Delete a NetworkPolicy whose spec is too large to be patched, and create it anew.

        Raises NameConflict if it remains, because it has finalizers.
        """
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        await self._delete(resources.NETWORK_POLICIES, namespace, name, found["metadata"]["uid"])
        try:
            return await self._client.create(
                resources.NETWORK_POLICIES, namespace, body, decode_as=resources.NetworkPolicy
            )
        except Conflict as error:
            raise NameConflict(f"NetworkPolicy {name} was altered and can't be deleted; delete it") from error

    async def _start(self, attempt: AttemptSpec) -> None:
        job = build_job(attempt, build_appdef(attempt, rendezvous_secret=secrets.token_hex(16)))
        found = await self._create(resources.JOBS, job, attempt.owner_uid, resources.Job)
        # The Job was created from an older spec, and the status has not been written since.
        if _get_digest(found) not in ("", _get_digest(job)):
            await self._delete_by_force([parse_job(found)])
            raise Conflict(f"Job {job['metadata']['name']} was created from an outdated spec")
        self._owned_objects.jobs.put_created(found)

    async def _create(
        self, resource: Resource, body: dict[str, Any], owner_uid: str, decode_as: resources.ObjectType
    ) -> dict[str, Any]:
        """Create an object, or return the existing one if this run owns it.

        Server-side apply would adopt the objects of a deleted run of the same name instead. Raises NameConflict if
        another owner has the name.
        """
        try:
            return await self._client.create(resource, body["metadata"]["namespace"], body, decode_as=decode_as)
        except Conflict:
            return await self._get_owned(resource, body, owner_uid, decode_as)

    async def _get_owned(
        self, resource: Resource, body: dict[str, Any], owner_uid: str, decode_as: resources.ObjectType
    ) -> dict[str, Any]:
        """Read the existing object with the name of `body`.

        Raises NameConflict if this run doesn't own it, or if it is a Job that differs from those that the run creates.
        """
        metadata = body["metadata"]
        existing = await self._client.get(resource, metadata["namespace"], metadata["name"], decode_as=decode_as)
        subject = f"{body['kind']} {metadata['name']} exists"
        if not _is_owned(existing["metadata"], metadata, owner_uid):
            raise NameConflict(f"{subject} and is not owned by this run; delete it or rename the run")
        if resource is resources.JOBS and (alteration := parse_job(existing).alteration):
            raise NameConflict(f"{subject}, but differs from the one that this run creates: {alteration}; delete it")
        return existing


def _is_needed(action: NetworkPolicyAction | None) -> bool:
    """Return whether workers may start only after this change of the NetworkPolicy."""
    return action not in (None, NetworkPolicyAction.DELETE)


def _build_policy_patch(found: dict[str, Any], spec: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Build the merge patch that restores labels and spec of a NetworkPolicy; empty if it has them. `spec`: the decoded
    spec of the object found."""
    metadata, labels = found["metadata"], wanted["metadata"]["labels"]
    changes = build_merge_patch(spec, wanted["spec"])
    if not changes and labels.items() <= metadata.get("labels", {}).items():
        return {}
    guard = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    return {"metadata": guard | {"labels": labels}, "spec": changes}


def _is_owned(existing: dict[str, Any], wanted: dict[str, Any], owner_uid: str) -> bool:
    """Return whether this run owns an object, or it is a claim that a deleted run of the same name left behind."""
    if "ownerReferences" not in wanted:
        return bool(existing.get("labels", {}).get(names.LABEL_RUN) == wanted["labels"][names.LABEL_RUN])
    owners = existing.get("ownerReferences", [])
    return any(owner["uid"] == owner_uid and owner.get("controller") for owner in owners)


def _get_digest(job: dict[str, Any]) -> str:
    """Return the digest of the stage that a Job was created for; empty if an earlier version didn't record it."""
    return str(job["metadata"]["labels"].get(names.LABEL_DIGEST, ""))
