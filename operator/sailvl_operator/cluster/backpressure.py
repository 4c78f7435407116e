"""Backpressure from the control plane: detects that many new Jobs lack pods, so that writes which can wait are
deferred."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.core.observe import JobRecord

HIGH_BACKLOG_JOBS = 50
"""The backlog is high if more young Jobs than this lack pods."""
YOUNG_SECONDS = 60.0
"""Jobs that started earlier are ignored: they wait for a quota or a webhook, not for the control plane."""
_CHECK_INTERVAL_SECONDS = 0.5


class StartupBacklog:
    """Counts young Jobs without all of their pods, at most twice a second.

    `clock`: Unix seconds, to compare with the times of Jobs.
    """

    def __init__(
        self,
        owned_objects: OwnedObjects,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owned_objects = owned_objects
        self._clock = clock
        self._monotonic = monotonic
        self._is_high, self._checked_at = False, float("-inf")
        self._complete: set[str] = set()  # UIDs of young Jobs that have had all their pods

    def is_high(self) -> bool:
        """Whether more than HIGH_BACKLOG_JOBS young Jobs lack pods."""
        now = self._monotonic()
        if now - self._checked_at >= _CHECK_INTERVAL_SECONDS:
            self._is_high, self._checked_at = self._count_exceeds_limit(), now
        return self._is_high

    def _count_exceeds_limit(self) -> bool:
        since = self._clock() - YOUNG_SECONDS
        young = [job for job in self._owned_objects.jobs if job.started > since and not _is_inactive(job)]
        self._complete.intersection_update(job.uid for job in young)
        lacking = (job for job in young if job.uid not in self._complete and not self._has_all_pods(job))
        return sum(1 for _ in islice(lacking, HIGH_BACKLOG_JOBS + 1)) > HIGH_BACKLOG_JOBS

    def _has_all_pods(self, job: JobRecord) -> bool:
        """Whether all pods of a Job have been created. A positive answer is remembered."""
        pods = self._owned_objects.pods.get((job.namespace, job.run))
        created = {pod.index for pod in pods if (pod.stage, pod.attempt) == (job.stage, job.attempt)}
        if len(created) < job.nodes:
            return False
        self._complete.add(job.uid)
        return True


def _is_inactive(job: JobRecord) -> bool:
    return job.is_gone or job.is_deleting or job.is_suspended
