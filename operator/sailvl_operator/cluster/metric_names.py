"""Limits the names of metrics that the workers of an attempt may report, over all their answers together.

Each name becomes a series in Prometheus, which keeps it for weeks. A worker that reported other names in every answer
would add series without end, although no single answer has too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.observe import AttemptKey, PodRecord
from sailvl_operator.core.reports import MAX_METRICS
from sailvl_trainer.contract import Progress


class MetricNames:
    """The first MAX_METRICS names that each attempt has reported.

    A restarted operator begins anew. `count_omitted`: called with the number of metrics that an answer had in excess.
    """

    def __init__(self, count_omitted: Callable[[int], object]) -> None:
        self._count_omitted = count_omitted
        self._names: dict[RunKey, dict[AttemptKey, tuple[str, frozenset[str]]]] = {}  # with the run's UID

    def restrict(self, pod: PodRecord, report: Progress) -> Progress:
        """Return the report of a pod without the metrics whose names its attempt has reported too late."""
        attempts = self._names.setdefault((pod.namespace, pod.run), {})
        uid, names = attempts.get((pod.stage, pod.attempt), ("", frozenset[str]()))
        if uid != pod.run_uid:
            names = frozenset()
        new = [name for name in report.metrics if name not in names]
        if not new:
            return report
        accepted = names.union(sorted(new)[: MAX_METRICS - len(names)])
        attempts[pod.stage, pod.attempt] = pod.run_uid, accepted
        metrics = {name: value for name, value in report.metrics.items() if name in accepted}
        if omitted := len(report.metrics) - len(metrics):
            self._count_omitted(omitted)
        return replace(report, metrics=metrics)

    def forget(self, key: RunKey, is_closed: Callable[[str, int], bool]) -> None:
        """Remove the names of closed attempts."""
        attempts = self._names.pop(key, {})
        if remaining := {attempt: names for attempt, names in attempts.items() if not is_closed(*attempt)}:
            self._names[key] = remaining
