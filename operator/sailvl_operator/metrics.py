"""All metrics of the operator.

The registry is passed in. The series of a run are computed from its status at each scrape, so that they disappear with
the run.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sailvl_operator.api.status import ConditionType, Status
from sailvl_operator.core.units import parse_time

RunStatus = tuple[str, str, Status]
"""Namespace, name and status of a run."""
Ages = Callable[[], Iterable[tuple[str, float]]]
"""Function that returns the name of each watched resource and the seconds since its watch last received data."""

_RUN = ("namespace", "run")
_STAGE = ("namespace", "run", "stage")
_STATES = (ConditionType.FAILED, ConditionType.SUCCEEDED, ConditionType.SUSPENDED, ConditionType.RUNNING)


class Metrics:
    """Counters and histograms that the components of the operator update directly."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.reconcile_seconds = Histogram(
            "sailvl_operator_reconcile_seconds",
            "Duration of a reconcile, including its writes to the API server.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self.reconciles = Counter(
            "sailvl_operator_reconciles",
            "Reconciles by outcome: unchanged, written, deferred, conflict or error.",
            ("outcome",),
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "sailvl_operator_queue_seconds",
            "Time that a key waits in the work queue before a worker takes it.",
            buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.api_calls = Counter(
            "sailvl_operator_api_calls",
            "Requests to the API server by verb and HTTP status code; 0 means no response.",
            ("verb", "code"),
            registry=registry,
        )
        self.watch_restarts = Counter(
            "sailvl_operator_watch_restarts",
            "Restarts of watches by resource and cause: expired, timeout or error.",
            ("resource", "cause"),
            registry=registry,
        )
        self.missed_changes = Counter(
            "sailvl_operator_missed_changes",
            "Run events missed by the watch and recovered by the watch audit.",
            registry=registry,
        )
        self.progress_reads = Counter(
            "sailvl_operator_progress_reads",
            "Requests to /progress of running attempts by outcome: ok or failed.",
            ("outcome",),
            registry=registry,
        )
        self.events = Counter(
            "sailvl_operator_events",
            "Kubernetes Events by outcome: written, failed or dropped.",
            ("outcome",),
            registry=registry,
        )


class OperatorCollector(Collector):
    """Collects the state of the work queue, the watches and the Lease at each scrape."""

    def __init__(
        self, *, queue: Callable[[], tuple[int, float]], watches: Ages, is_leading: Callable[[], bool]
    ) -> None:
        self._queue = queue
        self._watches = watches
        self._is_leading = is_leading

    def describe(self) -> Iterator[Metric]:
        """Return the metric families, so that a scrape can be restricted to some names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        depth, age = self._queue()
        yield GaugeMetricFamily("sailvl_operator_queue_depth", "Number of keys in the work queue.", value=depth)
        yield GaugeMetricFamily(
            "sailvl_operator_queue_oldest_seconds", "Time that the oldest key has waited in the work queue.", value=age
        )
        yield GaugeMetricFamily(
            "sailvl_operator_leading", "1 if this replica is the leader, else 0.", self._is_leading()
        )
        ages = GaugeMetricFamily(
            "sailvl_operator_watch_age_seconds",
            "Time since a watch last received an event or a bookmark.",
            labels=["resource"],
        )
        for resource, seconds in self._watches():
            ages.add_metric([resource], seconds)
        yield ages


class RunCollector(Collector):
    """Collects the series of all runs from their statuses at each scrape."""

    def __init__(self, statuses: Callable[[], Iterable[RunStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        statuses = list(self._statuses())
        yield _count_states(statuses)
        yield from _collect_stages(statuses)
        yield _collect_values(statuses)
        yield _collect_restarts(statuses)
        yield from _collect_goodput(statuses)
        yield _collect_stuck(statuses)


def get_run_state(status: Status) -> str:
    """Return the state of a run: failed, succeeded, suspended, running or pending."""
    return next((type_.lower() for type_ in _STATES if status.is_true(type_)), "pending")


def _count_states(statuses: list[RunStatus]) -> Metric:
    metric = GaugeMetricFamily(
        "sailvl_runs", "Number of runs by state; a stuck run is counted in addition to its state.", labels=["state"]
    )
    tally = Tally(get_run_state(status) for _, _, status in statuses)
    for state in (*(type_.lower() for type_ in _STATES), "pending"):
        metric.add_metric([state], tally[state])
    stuck = sum(status.is_true(ConditionType.STUCK) for _, _, status in statuses)
    metric.add_metric(["stuck"], stuck)
    return metric


def _collect_stages(statuses: list[RunStatus]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "sailvl_run_stage_state", "1 for the current state of a stage.", labels=[*_STAGE, "state"]
    )
    attempts = GaugeMetricFamily("sailvl_run_stage_attempt", "Number of the newest attempt of a stage.", labels=_STAGE)
    steps = GaugeMetricFamily("sailvl_run_stage_step", "Optimizer steps, samples or questions done.", labels=_STAGE)
    goals = GaugeMetricFamily(
        "sailvl_run_stage_steps", "Total number of optimizer steps, samples or questions; 0 if unknown.", labels=_STAGE
    )
    starts = GaugeMetricFamily(
        "sailvl_run_stage_started_timestamp_seconds", "Unix time at which a stage started.", labels=_STAGE
    )
    ends = GaugeMetricFamily(
        "sailvl_run_stage_completed_timestamp_seconds", "Unix time at which a stage completed.", labels=_STAGE
    )
    for namespace, run, status in statuses:
        for stage in status.stages:
            labels = (namespace, run, stage.name)
            for family, time in ((starts, stage.start_time), (ends, stage.completion_time)):
                if time:
                    family.add_metric(labels, parse_time(time))
            states.add_metric([*labels, stage.state.lower()], 1)
            attempts.add_metric(labels, stage.attempt)
            if stage.progress is not None:
                steps.add_metric(labels, stage.progress.step)
                goals.add_metric(labels, stage.progress.steps)
    yield from (states, attempts, steps, goals, starts, ends)


def _collect_values(statuses: list[RunStatus]) -> Metric:
    metric = GaugeMetricFamily(
        "sailvl_run_stage_metric",
        "Latest metrics of a stage: losses, scores and counts.",
        labels=[*_STAGE, "metric"],
    )
    for namespace, run, status in statuses:
        for stage in status.stages:
            for name, value in stage.metrics.items():
                metric.add_metric([namespace, run, stage.name, name], float(value))
    return metric


def _collect_restarts(statuses: list[RunStatus]) -> Metric:
    metric = CounterMetricFamily(
        "sailvl_run_restarts",
        "Restarts of a stage by the cause of the failure before them; InPlace counts restarts of ranks.",
        labels=[*_STAGE, "cause"],
    )
    for namespace, run, status in statuses:
        for stage in status.stages:
            for cause, count in stage.restarts.items():
                metric.add_metric([namespace, run, stage.name, cause], count)
    return metric


def _collect_goodput(statuses: list[RunStatus]) -> Iterator[Metric]:
    seconds = CounterMetricFamily(
        "sailvl_run_goodput_seconds", "Wall-clock time of a run by goodput bucket.", labels=[*_RUN, "bucket"]
    )
    gpu_seconds = CounterMetricFamily(
        "sailvl_run_goodput_gpu_seconds", "GPU time of a run by goodput bucket.", labels=[*_RUN, "bucket"]
    )
    lost = CounterMetricFamily(
        "sailvl_run_lost_steps", "Optimizer steps that had to be repeated after a failure.", labels=_RUN
    )
    cost = CounterMetricFamily("sailvl_run_cost", "Cost of all GPU time at the price of the run.", labels=_RUN)
    for namespace, run, status in statuses:
        for metric, buckets in ((seconds, status.goodput.seconds), (gpu_seconds, status.goodput.gpu_seconds)):
            for bucket, value in buckets.items():
                metric.add_metric([namespace, run, bucket], value)
        lost.add_metric([namespace, run], status.goodput.lost_steps)
        if status.goodput.cost:
            cost.add_metric([namespace, run], float(status.goodput.cost))
    yield from (seconds, gpu_seconds, lost, cost)


def _collect_stuck(statuses: list[RunStatus]) -> Metric:
    metric = GaugeMetricFamily("sailvl_run_stuck", "1 while a run is stuck, by reason.", labels=[*_RUN, "reason"])
    for namespace, run, status in statuses:
        stuck = status.condition(ConditionType.STUCK)
        if stuck is not None and stuck.status == "True":
            metric.add_metric([namespace, run, stuck.reason], 1)
    return metric
