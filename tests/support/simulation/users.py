"""What people do to a run on its random walk: create, edit, suspend, delete. Each says in words what it did."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType
from tests.support.builders.operator import build_document

if TYPE_CHECKING:
    from tests.support.simulation.walk import Walk

_POLICY = {"maxRestarts": 6, "maxInfraRestarts": 100, "startTimeoutSeconds": 300}


def create_the_run(walk: Walk) -> str:
    if walk.run is not None:
        return ""
    run = walk.api.create("sailvlruns", build_document(**_draw_spec(walk.rng)), by="a person")
    return str(run["metadata"]["uid"])


def _draw_spec(rng: random.Random) -> dict[str, Any]:
    """What people write."""
    drawn = build_document()["spec"]
    stages = drawn["stages"]
    for stage in stages:
        stage["workers"] = {"nodes": rng.choice([1, 1, 2, 3])}
        if rng.random() < 0.15:
            stage["gate"] = _draw_gate(rng)
    if rng.random() < 0.4:
        stages[3] |= {"dependsOn": ["alignment"], "initFrom": "alignment"}  # beside another
    workers: dict[str, Any] = {"gpusPerNode": rng.choice([0, 8])}
    if rng.random() < 0.15:
        workers["queueName"] = "training"
    rare = {
        "suspend": True,
        "pricePerGpuHour": "2.5",
        "activeDeadlineSeconds": rng.choice([600, 30_000]),
        "ttlSecondsAfterFinished": rng.choice([0, 60, 10_000]),
        "storage": {"volumeClaimTemplate": {"resources": {"requests": {"storage": "1Ti"}}}},
        "engine": {"name": "fsdp2"},  # refused until it is mended
    }
    chosen = {name: value for name, value in rare.items() if rng.random() < 0.08}
    return drawn | {"workers": workers, "restartPolicy": dict(_POLICY)} | chosen


def _draw_gate(rng: random.Random) -> dict[str, Any]:
    return {
        "metric": rng.choice(["heldOutLoss", "heldOutLoss", "score"]),
        "atMost": rng.choice(["1.0", "2.0", "2.0"]),
        "onFail": rng.choice(["Stop", "Continue", "Pause", "Pause"]),
    }


def replace_an_ended_run(walk: Walk) -> str:
    if walk.run is None or not walk.status.is_finished or walk.rng.random() < 0.5:
        return ""
    return _delete(walk)


def delete_the_run(walk: Walk) -> str:
    return "" if walk.run is None else _delete(walk)


def _delete(walk: Walk) -> str:
    assert walk.run is not None
    if walk.rng.random() < 0.3:
        walk.cluster.delete_in_the_foreground(walk.run)
        return "its children first"
    walk.api.remove("sailvlruns", walk.run, by="a person")
    return create_the_run(walk) if walk.rng.random() < 0.5 else "and leave it"


def suspend(walk: Walk) -> str:
    if walk.run is None or walk.run["spec"].get("suspend"):
        return ""
    walk.edit(lambda spec: spec.update(suspend=True))
    return "the run"


def suspend_for_a_moment(walk: Walk) -> str:
    if walk.run is None or walk.run["spec"].get("suspend"):
        return ""
    walk.edit(lambda spec: spec.update(suspend=True))
    walk.cluster.later(0.0, 3.0, resume, walk)
    return "the run"


def resume(walk: Walk) -> str:
    if walk.run is None or not walk.run["spec"].get("suspend"):
        return ""
    walk.edit(lambda spec: spec.update(suspend=False))
    return "the run"


def edit_the_workers(walk: Walk) -> str:
    if walk.run is None:
        return ""
    stage, nodes = walk.rng.randrange(len(walk.run["spec"]["stages"])), walk.rng.choice([1, 2, 3])
    walk.edit(lambda spec: spec["stages"][stage].update(workers={"nodes": nodes}))
    return f"stage {stage} has {nodes} nodes"


def edit_the_policy(walk: Walk) -> str:
    if walk.run is None:
        return ""
    policy = _POLICY | {"maxRestarts": walk.rng.choice([0, 2, 6, 10]), "maxInfraRestarts": walk.rng.choice([3, 100])}
    walk.edit(lambda spec: spec.update(restartPolicy=policy))
    return str(policy)


def edit_the_image(walk: Walk) -> str:
    if walk.run is None:
        return ""
    image = f"trainer:{walk.rng.randrange(100)}"
    walk.edit(lambda spec: spec.update(image=image))
    return image


def edit_a_gate(walk: Walk) -> str:
    if walk.run is None:
        return ""
    stage, gate = walk.rng.randrange(len(walk.run["spec"]["stages"])), _draw_gate(walk.rng)
    walk.edit(lambda spec: spec["stages"][stage].update(gate=gate))
    return f"stage {stage}: {gate}"


def mend_the_spec(walk: Walk) -> str:
    """Of a run that failed by it, or waits at a gate."""
    gated = walk.run is not None and any("gate" in stage for stage in walk.run["spec"]["stages"])
    if walk.run is None or not (gated or walk.status.is_true(ConditionType.FAILED)):
        return ""
    walk.edit(mend)
    return "gates, deadline and engine"


def mend(spec: dict[str, Any]) -> None:
    """Nothing in it stands in the way any more."""
    for name in ("activeDeadlineSeconds", "engine"):
        spec.pop(name, None)
    for stage in spec["stages"]:
        stage.pop("gate", None)


def ask_for_a_restart(walk: Walk) -> str:
    if walk.run is None:
        return ""
    name = walk.rng.choice([*(stage["name"] for stage in walk.run["spec"]["stages"]), "nonsense"])
    annotations = {names.ANNOTATION_RESTART: name}
    walk.api.change("sailvlruns", walk.run, lambda new: new["metadata"].update(annotations=annotations), by="a person")
    return name


def append_a_stage(walk: Walk) -> str:
    if walk.run is None or len(walk.run["spec"]["stages"]) >= 6:
        return ""
    name = f"extra-{len(walk.run['spec']['stages'])}"
    stage = {"name": name, "sft": {"data": [{"path": "/data/sft/more"}], "epochs": "1"}}
    walk.edit(lambda spec: spec["stages"].append(stage))
    return name


def delete_a_pod(walk: Walk) -> str:
    pod = walk.pod()
    if pod is None:
        return ""
    walk.api.delete("pods", pod, by="a person", grace=walk.rng.choice([None, 1]))
    return str(pod["metadata"]["name"])


def delete_a_job(walk: Walk) -> str:
    jobs = walk.api.all("jobs")
    if not jobs:
        return ""
    job = walk.rng.choice(jobs)
    walk.api.remove("jobs", job, by="a person")
    return str(job["metadata"]["name"])


def delete_the_service(walk: Walk) -> str:
    services = walk.api.all("services")
    if not services:
        return ""
    walk.api.remove("services", services[0], by="a person")
    return "gone"
