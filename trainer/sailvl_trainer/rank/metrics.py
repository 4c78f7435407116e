"""Every metric of the trainer; the registry is passed in. Ranks write through prometheus_client's multiprocess files,
and the worker's entry serves their sum, so that counts outlive a restart in place."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

LABELS = ("namespace", "run", "stage")

VALUES = {
    "loss": "Latest training loss, the mean over labelled positions.",
    "learning_rate": "Latest learning rate.",
    "gradient_norm": "Latest norm of the gradient, before clipping.",
    "tokens_per_second": "Positions a second in the latest step, over all ranks.",
    "pack_fill": "Part of the latest step's packs that is not padding.",
    "mfu": "Part of the accelerators' peak arithmetic that the latest step used.",
    "loader_queue": "Microbatches that are ready to be trained on.",
}
"""Numbers of a progress document that have a metric of their own: sailvl_<name>."""


class TrainerMetrics:
    """Names are part of the product: dashboards and alerts use them. What tells of the whole run comes from rank 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, words: str, *labels: str, mode: Literal["mostrecent", "livesum"] = "mostrecent") -> Gauge:
            return Gauge(name, words, (*LABELS, *labels), registry=registry, multiprocess_mode=mode)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, (*LABELS, *labels), registry=registry)

        self.step = gauge("sailvl_step", "Steps, samples or questions done, counting those before a resume.")
        self.steps = gauge("sailvl_steps", "How many there will be.")
        self.tokens = gauge("sailvl_tokens", "Positions trained on, padding not counted, with those before a resume.")
        self.checkpoint_step = gauge("sailvl_checkpoint_step", "Step of the newest checkpoint.")
        self.values = {name: gauge(f"sailvl_{name}", words) for name, words in VALUES.items()}
        self.score = gauge("sailvl_score", "Score by benchmark.", "benchmark")
        self.result = gauge("sailvl_result", "Other numbers of the stage, such as heldOutLoss.", "metric")
        self.samples = counter("sailvl_samples_total", "Samples by what became of them, of this worker.", "outcome")
        self.seconds = counter(
            "sailvl_activity_seconds_total",
            "Wall seconds by activity (starting, dataWait, training, …), summed over this worker's ranks.",
            "activity",
        )
        self.memory = gauge(
            "sailvl_memory_bytes", "Memory of this worker's ranks: resident, accelerator_peak.", "kind", mode="livesum"
        )

    def by_name(self, name: str, *, is_benchmark: bool) -> tuple[Gauge, dict[str, str]]:
        """The metric, and its labels, for a number of a progress document."""
        if name in self.values:
            return self.values[name], {}
        return (self.score, {"benchmark": name}) if is_benchmark else (self.result, {"metric": name})
