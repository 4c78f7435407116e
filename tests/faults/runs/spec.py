"""The small run into which faults are injected: each kind of stage once, with two workers, for a minute each."""

from __future__ import annotations

from typing import Any

from tests.faults.environment.volumes import BENCHMARKS

KINDS = {"curate": "curate", "align": "pretrain", "tune": "sft", "score": "evaluate"}
"""Kind of each stage, by name."""
TRAINING = ("align", "tune")
EPOCHS = 2
LOW_PRIORITY, HIGH_PRIORITY = "sailvl-faults-low", "sailvl-faults-high"
"""The run's priority is the lowest on the cluster, so that no other pod is preempted in its place."""

_TRAINING = {
    "epochs": str(EPOCHS),
    "batchTokens": "1024",
    "packTokens": "512",
    "maxTiles": 1,
    "heldOutSamples": 32,
    "checkpointSteps": 5,
}


def build_run(
    name: str,
    namespace: str,
    *,
    claim: str,
    stages: tuple[str, ...] = tuple(KINDS),
    policy: dict[str, Any] | None = None,
    image: str = "",
    learning_rate: str = "5e-4",
) -> dict[str, Any]:
    """Return a SailVLRun; `image` replaces the operator's default trainer image."""
    spec: dict[str, Any] = {
        "storage": {"volumeClaim": claim},
        "model": {"preset": "tiny", "language": "/data/models/tiny-language"},
        "workers": {
            "nodes": 2,
            "gpusPerNode": 0,
            "priorityClassName": LOW_PRIORITY,
            "resources": {"requests": {"cpu": "400m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "4Gi"}},
        },
        "restartPolicy": policy or {},
        "stages": [build_stage(stage, learning_rate) for stage in stages],
    }
    if image:
        spec["image"] = image
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "sailvl.dev/v1alpha1", "kind": "SailVLRun", "metadata": metadata, "spec": spec}


def build_stage(name: str, learning_rate: str) -> dict[str, Any]:
    """Return the spec of a stage."""
    match name:
        case "curate":
            sources = [{"format": "imagefolder", "path": f"/data/raw/{folder}"} for folder in ("shapes", "posters")]
            settings: dict[str, Any] = {"sources": sources, "heldOutFraction": "0.02", "maxTiles": 1}
            settings["dedup"] = {"perceptualDistance": -1}
        case "align":
            settings = {"train": ["connector"], "data": [{"from": "curate"}], "learningRate": "3e-3"} | _TRAINING
        case "tune":
            settings = {"data": [{"path": "/data/sft"}], "learningRate": learning_rate} | _TRAINING
        case _:
            settings = {"custom": [build_benchmark(benchmark) for benchmark in BENCHMARKS], "maxNewTokens": 8}
    return {"name": name, KINDS[name]: settings}


def build_benchmark(name: str) -> dict[str, Any]:
    """Return the spec of a benchmark on the volume."""
    path = f"/data/benchmarks/{name}.tsv"
    return {"name": name, "path": path, "metric": "exact_match", "group": "Shapes", "maxTiles": 1}
