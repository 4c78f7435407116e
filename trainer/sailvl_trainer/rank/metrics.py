"""Every metric of the trainer; the registry is passed in. Ranks write through prometheus_client's multiprocess files,
and the worker's entry serves their sum, so that counts outlive a restart in place."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

LABELS = ("namespace", "run", "stage")

VALUES = {
    "loss": "Training loss of the latest step, averaged over loss tokens.",
    "learning_rate": "Learning rate of the latest step.",
    "gradient_norm": "Gradient norm of the latest step before clipping.",
    "tokens_per_second": "Tokens per second of the latest step over all ranks.",
    "pack_fill": "Fraction of the packed tokens of the latest step that is not padding.",
    "mfu": "Model FLOPs utilization of the latest step, as a fraction of the accelerators' peak.",
    "loader_queue": "Number of microbatches that the data loader has ready.",
}
"""Numbers of a progress document that have a metric of their own: sailvl_<name>."""


class TrainerMetrics:
    """Names are part of the product: dashboards and alerts use them. What tells of the whole run comes from rank 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, words: str, *labels: str, mode: Literal["mostrecent", "livesum"] = "mostrecent") -> Gauge:
            return Gauge(name, words, (*LABELS, *labels), registry=registry, multiprocess_mode=mode)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, (*LABELS, *labels), registry=registry)

        self.step = gauge("sailvl_step", "Optimizer steps, samples or questions done, including those before a resume.")
        self.steps = gauge("sailvl_steps", "Total number of optimizer steps, samples or questions.")
        self.tokens = gauge("sailvl_tokens", "Tokens trained on without padding, including those before a resume.")
        self.checkpoint_step = gauge("sailvl_checkpoint_step", "Optimizer step of the newest checkpoint.")
        self.values = {name: gauge(f"sailvl_{name}", words) for name, words in VALUES.items()}
        self.score = gauge("sailvl_score", "Score by benchmark.", "benchmark")
        self.result = gauge("sailvl_result", "Other metrics of the stage, such as heldOutLoss.", "metric")
        self.samples = counter("sailvl_samples_total", "Samples of this worker by outcome.", "outcome")
        self.seconds = counter(
            "sailvl_activity_seconds_total",
            "Wall-clock time by activity (starting, dataWait, training, …), summed over the ranks of this worker.",
            "activity",
        )
        self.memory = gauge(
            "sailvl_memory_bytes",
            "Memory of the ranks of this worker by kind: resident or accelerator_peak.",
            "kind",
            mode="livesum",
        )

    def by_name(self, name: str, *, is_benchmark: bool) -> tuple[Gauge, dict[str, str]]:
        """The metric, and its labels, for a number of a progress document."""
        if name in self.values:
            return self.values[name], {}
        return (self.score, {"benchmark": name}) if is_benchmark else (self.result, {"metric": name})
