"""Carries out a Decision's writes to children: what starts first, then what ends. Doing it twice does no harm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sailvl_operator.api import names
from sailvl_operator.api.types import Run
from sailvl_operator.cluster import resources, wire
from sailvl_operator.cluster.client import Client
from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.cluster.parse import parse_job
from sailvl_operator.cluster.resources import Resource
from sailvl_operator.core.decision import Attempt, Decision
from sailvl_operator.core.desired.claim import build_claim
from sailvl_operator.core.desired.job import build_job
from sailvl_operator.core.desired.service import build_service
from sailvl_operator.core.desired.workload import build_appdef
from sailvl_operator.core.observe import JobRecord
from sailvl_operator.errors import REFUSALS, Conflict, NameConflict, NotFound, OperatorError

_DEAD_GRACE_SECONDS = 1
"""A dead attempt's hung ranks would hold their GPUs for the whole grace."""


Refused = dict[tuple[str, int], OperatorError]
"""What the API server doesn't make, and why, by stage and attempt."""


class Actions:
    """Writes through the client; what it makes is in the stores at once."""

    def __init__(self, client: Client, children: Children) -> None:
        self._client = client
        self._children = children
        self._prepared: dict[str, None] = {}  # uids of runs whose claim exists, oldest first

    async def carry_out(self, run: Run, decision: Decision) -> Refused:
        """All but the Service. The starts that were refused come back: what else has to be done doesn't wait for them,
        and may even make room. Raises ApiError; what was done stays done, and the next reconcile goes on from there.

        A dead attempt is ended after the next one was started.
        """
        await self._end_all(decision.clear)
        refused = await self._start_all(run, decision.start)
        await self._end_all(decision.end)
        for job, is_suspended in decision.suspend:
            await self._suspend(job, is_suspended)
        for job in decision.withdraw:
            await self._delete(resources.JOBS, job.namespace, job.name, job.uid)
        if decision.take_off_request:
            await self._take_off_request(run)
        if decision.delete_run:
            await self._delete(resources.RUNS, run.namespace, run.name, run.uid, version=run.resource_version)
        return refused

    async def serve(self, run: Run, _: Decision) -> Refused:
        """The Service by which workers find each other; they look for it once their programs are loaded.

        Raises ApiError or NameConflict.
        """
        service = build_service(namespace=run.namespace, run=run.name, owner_uid=run.uid)
        self._children.services.put_created(await self._create(resources.SERVICES, service, run.uid, wire.Service))
        return {}

    async def _start_all(self, run: Run, attempts: Iterable[Attempt]) -> Refused:
        refused: Refused = {}
        for attempt in attempts:
            try:
                await self._prepare(run)
                await self._start(attempt)
            except REFUSALS as error:
                refused[attempt.document.stage, attempt.document.attempt] = error
        return refused

    async def _end_all(self, jobs: Iterable[JobRecord]) -> None:
        for job in jobs:
            await self._end(job)

    async def _end(self, job: JobRecord) -> None:
        selector = f"{names.MANAGED_SELECTOR},{names.LABEL_JOB_NAME}={job.name}"
        await self._client.delete_collection(
            resources.PODS, job.namespace, selector=selector, grace_seconds=_DEAD_GRACE_SECONDS
        )
        if job.uid:
            await self._delete(resources.JOBS, job.namespace, job.name, job.uid)

    async def _delete(self, resource: Resource, namespace: str, name: str, uid: str, *, version: str = "") -> None:
        try:
            await self._client.delete(resource, namespace, name, uid=uid, version=version)
        except (NotFound, Conflict):
            return  # it is gone, was changed, or its name is another's by now

    async def _take_off_request(self, run: Run) -> None:
        """Only the value that was acted upon: a newer one changes the resourceVersion."""
        guard = {"uid": run.uid, "resourceVersion": run.resource_version}
        body = {"metadata": guard | {"annotations": {names.ANNOTATION_RESTART: None}}}
        await self._client.patch(resources.RUNS, run.namespace, run.name, body)

    async def _suspend(self, job: JobRecord, is_suspended: bool) -> None:
        labels = {names.LABEL_SUSPENDED: "true" if is_suspended else None}
        body = {"metadata": {"uid": job.uid, "labels": labels}, "spec": {"suspend": is_suspended}}
        self._children.jobs.put(await self._client.patch(resources.JOBS, job.namespace, job.name, body))

    async def _prepare(self, run: Run) -> None:
        """The claim, once for a run and process."""
        if run.uid in self._prepared:
            return
        claim = build_claim(run)
        if claim is not None:
            await self._create(resources.CLAIMS, claim, run.uid, wire.Ignored)
        self._prepared[run.uid] = None
        if len(self._prepared) > 10_000:
            del self._prepared[next(iter(self._prepared))]

    async def _start(self, attempt: Attempt) -> None:
        job = build_job(attempt, build_appdef(attempt))
        found = await self._create(resources.JOBS, job, attempt.owner_uid, wire.Job)
        if _digest(found) not in ("", _digest(job)):  # made before the spec was changed, which came before the status
            await self._end(parse_job(found))
            raise Conflict(f"Job {job['metadata']['name']} is of an earlier spec")
        self._children.jobs.put_created(found)

    async def _create(
        self, resource: Resource, body: dict[str, Any], owner_uid: str, decode_as: wire.ObjectType
    ) -> dict[str, Any]:
        """POST, or what is there already if it is ours: server-side apply would adopt a deleted run's leftovers."""
        metadata = body["metadata"]
        try:
            return await self._client.create(resource, metadata["namespace"], body, decode_as=decode_as)
        except Conflict:
            existing = await self._client.get(resource, metadata["namespace"], metadata["name"])
        if not _is_ours(existing["metadata"], body["metadata"], owner_uid):
            raise NameConflict(
                f"{body['kind']} {metadata['name']} exists and isn't this run's; delete it or rename the run"
            )
        return existing


def _is_ours(existing: dict[str, Any], wanted: dict[str, Any], owner_uid: str) -> bool:
    """Owned by this very run, or a claim that stayed behind when a run of this name was deleted."""
    if "ownerReferences" not in wanted:
        return bool(existing.get("labels", {}).get(names.LABEL_RUN) == wanted["labels"][names.LABEL_RUN])
    return any(owner["uid"] == owner_uid for owner in existing.get("ownerReferences", []))


def _digest(job: dict[str, Any]) -> str:
    """Of the stage that a Job carries out; empty: an earlier version made it, which didn't say."""
    return str(job["metadata"]["labels"].get(names.LABEL_DIGEST, ""))
