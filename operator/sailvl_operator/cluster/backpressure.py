"""Whether many Jobs wait for their pods at once: the control plane is then busy with what people wait for, and the work
queue lets writes wait that can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

from sailvl_operator.cluster.owned_objects import Children
from sailvl_operator.core.observe import JobRecord

MANY = 50
"""Jobs that lack pods."""
YOUNG_SECONDS = 60.0
"""After that it isn't the control plane that a Job waits for: a quota, or a webhook."""
_PAUSE = 0.5


class StartupBacklog:
    """Looks at the stores of Jobs and pods, twice a second at most."""

    def __init__(
        self,
        children: Children,
        *,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = children
        self._clock = clock
        self._monotonic = monotonic
        self._is_on, self._looked = False, float("-inf")
        self._whole: set[str] = set()  # uids of young Jobs that have had all their pods

    def is_high(self) -> bool:
        """Whether more than MANY young Jobs lack pods."""
        now = self._monotonic()
        if now - self._looked >= _PAUSE:
            self._is_on, self._looked = self._look(), now
        return self._is_on

    def _look(self) -> bool:
        since = self._clock() - YOUNG_SECONDS
        young = [job for job in self._children.jobs if job.started > since and not _is_over(job)]
        self._whole.intersection_update(job.uid for job in young)
        lacking = (job for job in young if job.uid not in self._whole and not self._has_pods(job))
        return sum(1 for _ in islice(lacking, MANY + 1)) > MANY

    def _has_pods(self, job: JobRecord) -> bool:
        """Whether they have all been made; if so, remembered."""
        pods = self._children.pods.get((job.namespace, job.run))
        made = {pod.index for pod in pods if (pod.stage, pod.attempt) == (job.stage, job.attempt)}
        if len(made) < job.nodes:
            return False
        self._whole.add(job.uid)
        return True


def _is_over(job: JobRecord) -> bool:
    return job.is_gone or job.is_deleting or job.is_suspended
