"""Every metric of the trainer; the registry is passed in. Ranks write through prometheus_client's multiprocess files,
and the worker's entry serves their sum, so that counts outlive a restart in place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

LABELS = ("namespace", "run", "stage")


class TrainerMetrics:
    """Names are part of the product: dashboards and alerts use them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return Gauge(name, words, (*LABELS, *labels), registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, (*LABELS, *labels), registry=registry)

        self.step = gauge("sailvl_step", "Steps, samples or questions done, counting those before a resume.")
        self.steps = gauge("sailvl_steps", "How many there will be.")
        self.value = gauge("sailvl_value", "Latest loss, learning rate, gradient norm, score, …", "name")
        self.tokens = counter("sailvl_tokens_total", "Positions trained on, padding not counted.")
        self.samples = counter("sailvl_samples_total", "Samples used.", "outcome")
        self.seconds = counter(
            "sailvl_activity_seconds_total", "Wall seconds by activity: data_wait, training, …", "activity"
        )
