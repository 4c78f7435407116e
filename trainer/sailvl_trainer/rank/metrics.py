"""All metrics of the trainer. Ranks write them to prometheus_client's multiprocess files, and the worker serves them.

Counters survive a restart of the ranks in place, because the worker sums the files of all processes. Metrics of the
whole run (step, tokens, loss) are set by rank 0 alone. Names are part of the product: dashboards and alerts use them.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

LABELS = ("run", "stage")
"""Labels of every metric. Prometheus adds the namespace and the pod, as for any target."""

VALUES = {
    "loss": "Training loss of the latest step, averaged over its loss tokens.",
    "learning_rate": "Learning rate of the latest step.",
    "gradient_norm": "Norm of the latest gradient, before clipping.",
    "tokens_per_second": "Tokens per second in the latest step, over all ranks.",
    "pack_fill": "Fraction of the latest step's packs that is not padding.",
    "mfu": "Model FLOPs utilization of the latest step: fraction of the accelerators' peak throughput.",
    "loader_queue": "Microbatches that are loaded and wait to be trained on.",
}
"""Values of a progress document that have their own metric, sailvl_<name>, with its help text."""


class TrainerMetrics:
    """The metrics of one rank, in the given registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str, mode: Literal["mostrecent", "livesum"] = "mostrecent") -> Gauge:
            return Gauge(name, text, (*LABELS, *labels), registry=registry, multiprocess_mode=mode)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*LABELS, *labels), registry=registry)

        self.step = gauge("sailvl_step", "Steps, samples or questions done, including those before a resume.")
        self.steps = gauge("sailvl_steps", "Total number of steps, samples or questions of the stage.")
        self.tokens = gauge("sailvl_tokens", "Tokens trained on, without padding, including those before a resume.")
        self.checkpoint_step = gauge("sailvl_checkpoint_step", "Step of the newest checkpoint.")
        self.values = {name: gauge(f"sailvl_{name}", text) for name, text in VALUES.items()}
        self.score = gauge("sailvl_score", "Score of a benchmark.", "benchmark")
        self.result = gauge("sailvl_result", "Other result values of the stage, such as heldOutLoss.", "metric")
        self.samples = counter(
            "sailvl_samples_total",
            "Samples processed by this worker, by outcome (trained, kept, duplicate, …).",
            "outcome",
        )
        self.seconds = counter(
            "sailvl_activity_seconds_total",
            "Wall-clock seconds by activity (starting, dataWait, training, …), summed over this worker's ranks.",
            "activity",
        )
        self.memory = gauge(
            "sailvl_memory_bytes", "Memory of this worker's ranks: resident, accelerator_peak.", "kind", mode="livesum"
        )

    def find_gauge(self, name: str, *, is_benchmark: bool) -> tuple[Gauge, dict[str, str]]:
        """Return the gauge, and its labels, for a value of a progress document."""
        if name in self.values:
            return self.values[name], {}
        return (self.score, {"benchmark": name}) if is_benchmark else (self.result, {"metric": name})
