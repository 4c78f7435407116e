"""Backpressure from the control plane: detects that many new Jobs lack pods, so that writes which can wait are
deferred.

Jobs whose pods a quota or an admission webhook refuses don't count: any tenant can have many of them, and they say
nothing about the control plane.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

from sailvl_operator.api.status import Reason
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.observe import AttemptKey, JobRecord, Obstacle
from sailvl_operator.core.stuck import find_reason

HIGH_BACKLOG_JOBS = 50
"""The backlog is high if more young Jobs than this lack pods."""
YOUNG_SECONDS = 60.0
"""Jobs that started earlier are ignored: they wait for a quota or a webhook, not for the control plane."""
_CHECK_INTERVAL_SECONDS = 0.5
_REFUSALS = frozenset({Reason.QUOTA, Reason.ADMISSION})
"""Reasons for which a namespace, and not the control plane, lacks pods."""


class StartupBacklog:
    """Counts young Jobs without all of their pods, at most twice a second.

    `get_obstacles`: returns what is known to keep the attempts of a run from starting. `clock`: Unix seconds, to be
    compared with the times of Jobs.
    """

    def __init__(
        self,
        owned_objects: OwnedObjects,
        *,
        get_obstacles: Callable[[RunKey], Mapping[AttemptKey, Obstacle]] = lambda _: {},
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owned_objects = owned_objects
        self._get_obstacles = get_obstacles
        self._clock = clock
        self._monotonic = monotonic
        self._lacking: Counter[str] = Counter()  # young Jobs that lack pods, by namespace
        self._checked_at = float("-inf")
        self._complete: set[str] = set()  # UIDs of young Jobs that have had all their pods

    def is_high(self, namespace: str) -> bool:
        """Whether more than HIGH_BACKLOG_JOBS young Jobs lack pods, and this namespace has its equal share of them."""
        now = self._monotonic()
        if now - self._checked_at >= _CHECK_INTERVAL_SECONDS:
            self._lacking, self._checked_at = Counter(job.namespace for job in self._find_lacking()), now
        total = self._lacking.total()
        return total > HIGH_BACKLOG_JOBS and self._lacking[namespace] * len(self._lacking) >= total

    def _find_lacking(self) -> Iterator[JobRecord]:
        """Yield the young Jobs without all of their pods. Jobs that have them are remembered."""
        since = self._clock() - YOUNG_SECONDS
        young = [job for job in self._owned_objects.jobs if job.started > since and not _is_inactive(job)]
        self._complete.intersection_update(job.uid for job in young)
        by_run: dict[tuple[str, str], list[JobRecord]] = defaultdict(list)
        for job in young:
            if job.uid not in self._complete:
                by_run[job.namespace, job.run].append(job)
        for key, jobs in by_run.items():
            created = {(pod.owner_uid, pod.index) for pod in self._owned_objects.pods.get(key)}
            pods = Counter(owner_uid for owner_uid, _ in created)
            self._complete.update(job.uid for job in jobs if pods[job.uid] >= job.nodes)
            yield from (job for job in jobs if pods[job.uid] < job.nodes and not self._is_refused(job))

    def _is_refused(self, job: JobRecord) -> bool:
        obstacle = self._get_obstacles((job.namespace, job.run)).get((job.stage, job.attempt))
        return obstacle is not None and find_reason(obstacle) in _REFUSALS


def _is_inactive(job: JobRecord) -> bool:
    return job.is_gone or job.is_deleting or job.is_suspended or bool(job.alteration)
