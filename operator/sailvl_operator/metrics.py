"""Every metric of the operator. The registry is passed in; a run's series are computed from its status at each scrape,
so they go when the run goes.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sailvl_operator.api.status import ConditionType, Status
from sailvl_operator.core.observe import parse_time

RunStatus = tuple[str, str, Status]
"""namespace, name, status"""
Ages = Callable[[], Iterable[tuple[str, float]]]

_RUN = ("namespace", "run")
_STAGE = ("namespace", "run", "stage")
_STATES = (ConditionType.FAILED, ConditionType.SUCCEEDED, ConditionType.SUSPENDED, ConditionType.RUNNING)


class Metrics:
    """Counters and histograms that the parts of the operator move themselves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.reconcile_seconds = Histogram(
            "sailvl_operator_reconcile_seconds",
            "Time of one reconcile, its writes included.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self.reconciles = Counter(
            "sailvl_operator_reconciles",
            "Reconciles by outcome: unchanged, written, put off, conflict or error.",
            ("outcome",),
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "sailvl_operator_queue_seconds",
            "Time from a key's arrival until a worker takes it.",
            buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self.api_calls = Counter(
            "sailvl_operator_api_calls",
            "Requests to the API server, by verb and HTTP code (0: no answer).",
            ("verb", "code"),
            registry=registry,
        )
        self.watch_restarts = Counter(
            "sailvl_operator_watch_restarts",
            "Watches started again, by resource and cause: expired, timeout or error.",
            ("resource", "cause"),
            registry=registry,
        )
        self.missed_changes = Counter(
            "sailvl_operator_missed_changes",
            "Changes of runs that their watch had not told of after a minute, and that were made up for.",
            registry=registry,
        )
        self.progress_reads = Counter(
            "sailvl_operator_progress_reads",
            "Reads of /progress from running attempts, by outcome: ok or failed.",
            ("outcome",),
            registry=registry,
        )
        self.events = Counter(
            "sailvl_operator_events",
            "Kubernetes events, by outcome: written, failed or dropped.",
            ("outcome",),
            registry=registry,
        )


class OperatorCollector(Collector):
    """The operator's state at the time of a scrape."""

    def __init__(
        self, *, queue: Callable[[], tuple[int, float]], watches: Ages, is_leading: Callable[[], bool]
    ) -> None:
        self._queue = queue
        self._watches = watches
        self._is_leading = is_leading

    def describe(self) -> Iterator[Metric]:
        """Its names, for those who ask for some series only."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        depth, age = self._queue()
        yield GaugeMetricFamily("sailvl_operator_queue_depth", "Keys that wait for a worker.", value=depth)
        yield GaugeMetricFamily("sailvl_operator_queue_oldest_seconds", "Age of the oldest of them.", value=age)
        yield GaugeMetricFamily("sailvl_operator_leading", "1 when this replica holds the lease.", self._is_leading())
        ages = GaugeMetricFamily(
            "sailvl_operator_watch_age_seconds", "Time since a watch last said anything.", labels=["resource"]
        )
        for resource, seconds in self._watches():
            ages.add_metric([resource], seconds)
        yield ages


class RunCollector(Collector):
    """What the statuses of all runs say."""

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


def state_of(status: Status) -> str:
    """One word for where a run stands: failed, succeeded, suspended, running or pending."""
    return next((type_.lower() for type_ in _STATES if status.is_true(type_)), "pending")


def _count_states(statuses: list[RunStatus]) -> Metric:
    metric = GaugeMetricFamily("sailvl_runs", "Runs by state.", labels=["state"])
    tally = Tally(state_of(status) for _, _, status in statuses)
    for state in (*(type_.lower() for type_ in _STATES), "pending"):
        metric.add_metric([state], tally[state])
    stuck = sum(status.is_true(ConditionType.STUCK) for _, _, status in statuses)
    metric.add_metric(["stuck"], stuck)
    return metric


def _collect_stages(statuses: list[RunStatus]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "sailvl_run_stage_state", "1 for the state that a stage is in.", labels=[*_STAGE, "state"]
    )
    attempts = GaugeMetricFamily("sailvl_run_stage_attempt", "Number of a stage's newest attempt.", labels=_STAGE)
    steps = GaugeMetricFamily("sailvl_run_stage_step", "Steps, samples or questions done.", labels=_STAGE)
    goals = GaugeMetricFamily("sailvl_run_stage_steps", "How many there will be; 0: not known yet.", labels=_STAGE)
    starts = GaugeMetricFamily("sailvl_run_stage_started_timestamp_seconds", "When a stage began.", labels=_STAGE)
    ends = GaugeMetricFamily("sailvl_run_stage_completed_timestamp_seconds", "When a stage ended.", labels=_STAGE)
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
        "Newest values that a stage told of: losses, scores, counts.",
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
        "New attempts by the cause of the failure before them, and restarts in place.",
        labels=[*_STAGE, "cause"],
    )
    for namespace, run, status in statuses:
        for stage in status.stages:
            for cause, count in stage.restarts.items():
                metric.add_metric([namespace, run, stage.name, cause], count)
    return metric


def _collect_goodput(statuses: list[RunStatus]) -> Iterator[Metric]:
    seconds = CounterMetricFamily(
        "sailvl_run_goodput_seconds", "Where a run's time went, by bucket.", labels=[*_RUN, "bucket"]
    )
    gpu_seconds = CounterMetricFamily(
        "sailvl_run_goodput_gpu_seconds", "Where a run's GPU time went, by bucket.", labels=[*_RUN, "bucket"]
    )
    lost = CounterMetricFamily("sailvl_run_lost_steps", "Steps that were lost with an attempt.", labels=_RUN)
    cost = CounterMetricFamily("sailvl_run_cost", "What the GPUs cost at the run's price.", labels=_RUN)
    for namespace, run, status in statuses:
        for metric, buckets in ((seconds, status.goodput.seconds), (gpu_seconds, status.goodput.gpu_seconds)):
            for bucket, value in buckets.items():
                metric.add_metric([namespace, run, bucket], value)
        lost.add_metric([namespace, run], status.goodput.lost_steps)
        if status.goodput.cost:
            cost.add_metric([namespace, run], float(status.goodput.cost))
    yield from (seconds, gpu_seconds, lost, cost)


def _collect_stuck(statuses: list[RunStatus]) -> Metric:
    metric = GaugeMetricFamily("sailvl_run_stuck", "1 while a run is stuck, by the reason.", labels=[*_RUN, "reason"])
    for namespace, run, status in statuses:
        stuck = status.condition(ConditionType.STUCK)
        if stuck is not None and stuck.status == "True":
            metric.add_metric([namespace, run, stuck.reason], 1)
    return metric
