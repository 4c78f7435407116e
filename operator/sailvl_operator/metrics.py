"""Metrics of the operator itself; those of the runs are in `run_series.py`. The registry is passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sailvl_operator.core.reports import MAX_METRICS

Ages = Callable[[], Iterable[tuple[str, float]]]
"""Function that returns the name of each watched resource and the seconds since its watch last received data."""

LOOPS = (
    "controller",
    "informer-jobs",
    "informer-networkpolicies",
    "informer-pods",
    "informer-services",
    "progress",
    "recorder",
    "runs",
    "start-diagnostics",
    "watch-audit",
)
"""Background loops whose unexpected errors are counted; `runs` is the watch of runs."""


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
            "Restarts of watches by resource and cause: expired, timeout, forbidden or error.",
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
        self.omitted_metrics = Counter(
            "sailvl_operator_omitted_metrics",
            f"Metrics in answers of /progress that were left out: an attempt had reported {MAX_METRICS} other names.",
            registry=registry,
        )
        self.loop_errors = _build_loop_errors(registry)
        self.events = Counter(
            "sailvl_operator_events",
            "Kubernetes Events by outcome: written, failed or dropped.",
            ("outcome",),
            registry=registry,
        )

    def count_loop_error(self, loop: str) -> None:
        """Count an unexpected error in a background loop."""
        self.loop_errors.labels(loop).inc()


def _build_loop_errors(registry: CollectorRegistry) -> Counter:
    """Build the counter with a series of 0 for each loop, without which Prometheus doesn't see the first error."""
    counter = Counter(
        "sailvl_operator_loop_errors",
        "Unexpected errors in background loops, which continue: " + ", ".join(LOOPS) + ".",
        ("loop",),
        registry=registry,
    )
    for loop in LOOPS:
        counter.labels(loop)
    return counter


class OperatorCollector(Collector):
    """Collects the state of the work queue, the watches and the Lease at each scrape.

    The functions are called by `take_snapshot` in the event loop; the rest may run in another thread.
    """

    def __init__(
        self, *, queue: Callable[[], tuple[int, float]], watches: Ages, is_leading: Callable[[], bool]
    ) -> None:
        self._queue = queue
        self._watches = watches
        self._is_leading = is_leading
        self.take_snapshot()

    def take_snapshot(self) -> None:
        """Remember the state that `collect` reports."""
        self._depth, self._oldest_seconds = self._queue()
        self._ages = dict(self._watches())
        self._leads = self._is_leading()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("sailvl_operator_queue_depth", "Number of keys in the work queue.", value=self._depth)
        yield GaugeMetricFamily(
            "sailvl_operator_queue_oldest_seconds",
            "Time that the oldest key has waited in the work queue.",
            value=self._oldest_seconds,
        )
        yield GaugeMetricFamily("sailvl_operator_leading", "1 if this replica is the leader, else 0.", self._leads)
        ages = GaugeMetricFamily(
            "sailvl_operator_watch_age_seconds",
            "Time since a watch last received an event or a bookmark.",
            labels=["resource"],
        )
        for resource, seconds in self._ages.items():
            ages.add_metric([resource], seconds)
        yield ages
