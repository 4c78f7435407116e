"""Series of the runs for Prometheus, computed from their statuses at each scrape, so that they disappear with the run.

Tenants decide how many runs there are, and what their workers report. The number of series of each metric is therefore
limited, and the limit is divided fairly among the namespaces. A run whose status can't be read loses only its own
series.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sailvl_operator.api.status import ConditionType, StageStatus, Status
from sailvl_operator.core.units import parse_time

log = logging.getLogger(__name__)

RunStatus = tuple[str, str, Callable[[], Status]]
"""Namespace and name of a run, and a function that decodes its status."""

MAX_SERIES = 20_000
"""Largest number of series of one metric."""
MAX_LABEL_LENGTH = 128
"""Letters of a label's value; longer values are cut."""

_RUN = ("namespace", "run")
_STAGE = ("namespace", "run", "stage")
_STATES = (ConditionType.FAILED, ConditionType.SUCCEEDED, ConditionType.SUSPENDED, ConditionType.RUNNING)

_GAUGES = {
    "sailvl_run_stage_state": ("1 for the current state of a stage.", (*_STAGE, "state")),
    "sailvl_run_stage_attempt": ("Number of the newest attempt of a stage.", _STAGE),
    "sailvl_run_stage_step": ("Optimizer steps, samples or questions done.", _STAGE),
    "sailvl_run_stage_steps": ("Total number of optimizer steps, samples or questions; 0 if unknown.", _STAGE),
    "sailvl_run_stage_started_timestamp_seconds": ("Unix time at which a stage started.", _STAGE),
    "sailvl_run_stage_completed_timestamp_seconds": ("Unix time at which a stage completed.", _STAGE),
    "sailvl_run_stage_metric": ("Latest metrics of a stage: losses, scores and counts.", (*_STAGE, "metric")),
    "sailvl_run_stuck": ("1 while a run is stuck, by reason.", (*_RUN, "reason")),
}
"""Help and labels of each gauge."""
_COUNTERS = {
    "sailvl_run_restarts": (
        "Restarts of a stage by the cause of the failure before them; InPlace counts restarts of ranks.",
        (*_STAGE, "cause"),
    ),
    "sailvl_run_goodput_seconds": ("Wall-clock time of a run by goodput bucket.", (*_RUN, "bucket")),
    "sailvl_run_goodput_gpu_seconds": ("GPU time of a run by goodput bucket.", (*_RUN, "bucket")),
    "sailvl_run_lost_steps": ("Optimizer steps that had to be repeated after a failure.", _RUN),
    "sailvl_run_cost": ("Cost of all GPU time at the price of the run.", _RUN),
}
"""Help and labels of each counter."""

Sample = tuple[str, tuple[str, ...], float]
"""Metric, labels after namespace and run, and value."""
Series = tuple[tuple[str, ...], float]
"""Labels and value."""


class RunCollector(Collector):
    """Collects the series of all runs.

    `statuses` is called by `take_snapshot` in the event loop; the rest may run in another thread.
    """

    def __init__(self, statuses: Callable[[], Iterable[RunStatus]], *, max_series: int = MAX_SERIES) -> None:
        self._statuses = statuses
        self._max_series = max_series
        self._snapshot: list[RunStatus] | None = None

    def take_snapshot(self) -> None:
        """Remember the statuses that the next `collect` reads."""
        self._snapshot = list(self._statuses())

    def collect(self) -> Iterator[Metric]:
        runs, self._snapshot = self._snapshot, None
        statuses = _Statuses(self._statuses() if runs is None else runs, self._max_series)
        series, omitted = statuses.limit_series()
        yield statuses.count_states()
        for name, (help_, labels) in _GAUGES.items():
            yield _fill(GaugeMetricFamily(name, help_, labels=labels), series.get(name, ()))
        for name, (help_, labels) in _COUNTERS.items():
            yield _fill(CounterMetricFamily(name, help_, labels=labels), series.get(name, ()))
        yield _fill(
            GaugeMetricFamily(
                "sailvl_operator_omitted_series",
                f"Number of series that were left out, because a metric may have {MAX_SERIES} of them.",
                labels=["metric"],
            ),
            [((metric,), count) for metric, count in omitted.items()],
        )
        yield GaugeMetricFamily(
            "sailvl_operator_unreadable_runs",
            "Number of runs without series, because their status can't be read.",
            value=statuses.unreadable,
        )


def get_run_state(status: Status) -> str:
    """Return the state of a run: failed, succeeded, suspended, running or pending."""
    return next((type_.lower() for type_ in _STATES if status.is_true(type_)), "pending")


class _Statuses:
    """The series of all runs by metric and namespace, and the number of runs by state."""

    def __init__(self, runs: Iterable[RunStatus], limit: int) -> None:
        self.unreadable = 0
        self._limit = limit
        self._series: dict[str, dict[str, list[Series]]] = defaultdict(lambda: defaultdict(list))
        self._omitted: Tally[str] = Tally()
        self._states: Tally[str] = Tally()
        finished = []
        for namespace, run, decode in runs:
            try:
                status = decode()
                samples = [(metric, labels, float(value)) for metric, labels, value in _describe_run(status)]
            except Exception:  # noqa: BLE001  # a client with write access to the status can store anything in it
                log.debug("status not readable, its series are left out", extra={"namespace": namespace, "run": run})
                self.unreadable += 1
                continue
            self._states[get_run_state(status)] += 1
            self._states["stuck"] += status.is_true(ConditionType.STUCK)
            if status.is_finished:
                finished.append((namespace, run, samples))
            else:
                self._add(namespace, run, samples)
        for namespace, run, samples in finished:  # last, so that they are left out first
            self._add(namespace, run, samples)

    def _add(self, namespace: str, run: str, samples: Iterable[Sample]) -> None:
        for metric, labels, value in samples:
            series = self._series[metric][namespace]
            if len(series) < self._limit:
                series.append(((namespace, run, *labels), value))
            else:
                self._omitted[metric] += 1

    def limit_series(self) -> tuple[dict[str, list[Series]], dict[str, int]]:
        """Return at most `limit` series of each metric, and how many are left out of each that has more."""
        included: dict[str, list[Series]] = {}
        for metric, by_namespace in self._series.items():
            included[metric] = list(_select_fairly(by_namespace.values(), self._limit))
            excess = sum(map(len, by_namespace.values())) - len(included[metric])
            if excess:
                self._omitted[metric] += excess
        return included, self._omitted

    def count_states(self) -> Metric:
        """Build the metric that counts runs by state."""
        metric = GaugeMetricFamily(
            "sailvl_runs", "Number of runs by state; a stuck run is counted in addition to its state.", labels=["state"]
        )
        for state in (*(type_.lower() for type_ in _STATES), "pending", "stuck"):
            metric.add_metric([state], self._states[state])
        return metric


def _select_fairly(groups: Iterable[list[Series]], limit: int) -> Iterator[Series]:
    """Yield at most `limit` series; a group that has less than its equal share leaves the rest to larger ones."""
    by_size = sorted(groups, key=len)
    for position, group in enumerate(by_size):
        share = limit // (len(by_size) - position)
        yield from group[:share]
        limit -= min(share, len(group))


def _fill(metric: GaugeMetricFamily | CounterMetricFamily, series: Iterable[Series]) -> Metric:
    for labels, value in series:
        metric.add_metric([_clean_label(label) for label in labels], value)
    return metric


def _clean_label(value: str) -> str:
    """Return a value that can be encoded and isn't too long."""
    is_clean = len(value) <= MAX_LABEL_LENGTH and value.isascii()
    return value if is_clean else value[:MAX_LABEL_LENGTH].encode(errors="replace").decode()


def _describe_run(status: Status) -> Iterator[Sample]:
    """Yield the samples of one run. Raises ValueError if a number or a time in the status is malformed."""
    for stage in status.stages:
        yield from _describe_stage(stage)
    goodput = status.goodput
    for bucket, seconds in goodput.seconds.items():
        yield "sailvl_run_goodput_seconds", (bucket,), seconds
    for bucket, seconds in goodput.gpu_seconds.items():
        yield "sailvl_run_goodput_gpu_seconds", (bucket,), seconds
    yield "sailvl_run_lost_steps", (), goodput.lost_steps
    if goodput.cost:
        yield "sailvl_run_cost", (), float(goodput.cost)
    stuck = status.condition(ConditionType.STUCK)
    if stuck is not None and stuck.status == "True":
        yield "sailvl_run_stuck", (stuck.reason,), 1


def _describe_stage(stage: StageStatus) -> Iterator[Sample]:
    labels = (stage.name,)
    yield "sailvl_run_stage_state", (*labels, stage.state.lower()), 1
    yield "sailvl_run_stage_attempt", labels, stage.attempt
    if stage.start_time:
        yield "sailvl_run_stage_started_timestamp_seconds", labels, parse_time(stage.start_time)
    if stage.completion_time:
        yield "sailvl_run_stage_completed_timestamp_seconds", labels, parse_time(stage.completion_time)
    if stage.progress is not None:
        yield "sailvl_run_stage_step", labels, stage.progress.step
        yield "sailvl_run_stage_steps", labels, stage.progress.steps
    for name, value in stage.metrics.items():
        yield "sailvl_run_stage_metric", (*labels, name), float(value)
    for cause, count in stage.restarts.items():
        yield "sailvl_run_restarts", (*labels, cause), count
