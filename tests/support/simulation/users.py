"""Steps of the random walk that users take: create, edit, suspend and delete a run and its objects.

Like all steps, each returns a description of what it did, or an empty string if it was not possible.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType
from tests.support.builders.operator import build_document

if TYPE_CHECKING:
    from tests.support.simulation.walk import RandomWalk

_POLICY = {"maxRestarts": 6, "maxInfraRestarts": 100, "startTimeoutSeconds": 300}


def create_run(walk: RandomWalk) -> str:
    if walk.run is not None:
        return ""
    run = walk.api.create("sailvlruns", build_document(**_draw_spec(walk.rng)), by="a user")
    return str(run["metadata"]["uid"])


def _draw_spec(rng: random.Random) -> dict[str, Any]:
    """Return a spec with drawn workers, gates and rarely used fields."""
    drawn = build_document()["spec"]
    stages = drawn["stages"]
    for stage in stages:
        stage["workers"] = {"nodes": rng.choice([1, 1, 2, 3])}
        if rng.random() < 0.15:
            stage["gate"] = _draw_gate(rng)
    if rng.random() < 0.4:
        stages[3] |= {"dependsOn": ["alignment"], "initFrom": "alignment"}  # runs in parallel with another stage
    workers: dict[str, Any] = {"gpusPerNode": rng.choice([0, 8])}
    if rng.random() < 0.15:
        workers["queueName"] = "training"
    rare = {
        "suspend": True,
        "pricePerGpuHour": "2.5",
        "activeDeadlineSeconds": rng.choice([600, 30_000]),
        "ttlSecondsAfterFinished": rng.choice([0, 60, 10_000]),
        "storage": {"volumeClaimTemplate": {"resources": {"requests": {"storage": "1Ti"}}}},
        "engine": {"name": "fsdp2"},  # the spec is invalid until a user fixes it
    }
    chosen = {name: value for name, value in rare.items() if rng.random() < 0.08}
    return drawn | {"workers": workers, "restartPolicy": dict(_POLICY)} | chosen


def _draw_gate(rng: random.Random) -> dict[str, Any]:
    return {
        "metric": rng.choice(["heldOutLoss", "heldOutLoss", "score"]),
        "atMost": rng.choice(["1.0", "2.0", "2.0"]),
        "onFail": rng.choice(["Stop", "Continue", "Pause", "Pause"]),
    }


def replace_finished_run(walk: RandomWalk) -> str:
    if walk.run is None or not walk.status.is_finished or walk.rng.random() < 0.5:
        return ""
    return _delete_run(walk)


def delete_run(walk: RandomWalk) -> str:
    return "" if walk.run is None else _delete_run(walk)


def _delete_run(walk: RandomWalk) -> str:
    assert walk.run is not None
    if walk.rng.random() < 0.3:
        walk.cluster.delete_in_foreground(walk.run)
        return "its dependents first"
    walk.api.remove("sailvlruns", walk.run, by="a user")
    return create_run(walk) if walk.rng.random() < 0.5 else "without a new one"


def suspend(walk: RandomWalk) -> str:
    if walk.run is None or walk.run["spec"].get("suspend"):
        return ""
    walk.edit_spec(lambda spec: spec.update(suspend=True))
    return "the run"


def suspend_briefly(walk: RandomWalk) -> str:
    if walk.run is None or walk.run["spec"].get("suspend"):
        return ""
    walk.edit_spec(lambda spec: spec.update(suspend=True))
    walk.cluster.call_later(0.0, 3.0, resume, walk)
    return "the run"


def resume(walk: RandomWalk) -> str:
    if walk.run is None or not walk.run["spec"].get("suspend"):
        return ""
    walk.edit_spec(lambda spec: spec.update(suspend=False))
    return "the run"


def edit_workers(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    stage, nodes = walk.rng.randrange(len(walk.run["spec"]["stages"])), walk.rng.choice([1, 2, 3])
    walk.edit_spec(lambda spec: spec["stages"][stage].update(workers={"nodes": nodes}))
    return f"stage {stage} has {nodes} nodes"


def edit_restart_policy(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    policy = _POLICY | {"maxRestarts": walk.rng.choice([0, 2, 6, 10]), "maxInfraRestarts": walk.rng.choice([3, 100])}
    walk.edit_spec(lambda spec: spec.update(restartPolicy=policy))
    return str(policy)


def edit_image(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    image = f"trainer:{walk.rng.randrange(100)}"
    walk.edit_spec(lambda spec: spec.update(image=image))
    return image


def edit_network(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    policy = walk.rng.choice(["Disabled", "Enabled", "Enabled"])
    walk.edit_spec(lambda spec: spec.update(network={"policy": policy}))
    return policy


def edit_gate(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    stage, gate = walk.rng.randrange(len(walk.run["spec"]["stages"])), _draw_gate(walk.rng)
    walk.edit_spec(lambda spec: spec["stages"][stage].update(gate=gate))
    return f"stage {stage}: {gate}"


def fix_spec(walk: RandomWalk) -> str:
    """Remove what makes a run fail or wait at a gate."""
    gated = walk.run is not None and any("gate" in stage for stage in walk.run["spec"]["stages"])
    if walk.run is None or not (gated or walk.status.is_true(ConditionType.FAILED)):
        return ""
    walk.edit_spec(remove_obstacles)
    return "no gates, deadline or engine"


def remove_obstacles(spec: dict[str, Any]) -> None:
    """Remove every field of a spec that can keep its run from succeeding."""
    for name in ("activeDeadlineSeconds", "engine"):
        spec.pop(name, None)
    for stage in spec["stages"]:
        stage.pop("gate", None)


def request_restart(walk: RandomWalk) -> str:
    if walk.run is None:
        return ""
    name = walk.rng.choice([*(stage["name"] for stage in walk.run["spec"]["stages"]), "nonsense"])
    annotations = {names.ANNOTATION_RESTART: name}
    walk.api.update("sailvlruns", walk.run, lambda new: new["metadata"].update(annotations=annotations), by="a user")
    return name


def append_stage(walk: RandomWalk) -> str:
    if walk.run is None or len(walk.run["spec"]["stages"]) >= 6:
        return ""
    name = f"extra-{len(walk.run['spec']['stages'])}"
    stage = {"name": name, "sft": {"data": [{"path": "/data/sft/more"}], "epochs": "1"}}
    walk.edit_spec(lambda spec: spec["stages"].append(stage))
    return name


def delete_pod(walk: RandomWalk) -> str:
    pod = walk.draw_pod()
    if pod is None:
        return ""
    walk.api.delete("pods", pod, by="a user", grace_seconds=walk.rng.choice([None, 1]))
    return str(pod["metadata"]["name"])


def delete_job(walk: RandomWalk) -> str:
    jobs = walk.api.list_objects("jobs")
    if not jobs:
        return ""
    job = walk.rng.choice(jobs)
    walk.api.remove("jobs", job, by="a user")
    return str(job["metadata"]["name"])


def delete_service(walk: RandomWalk) -> str:
    services = walk.api.list_objects("services")
    if not services:
        return ""
    walk.api.remove("services", services[0], by="a user")
    return "deleted"


def delete_network_policy(walk: RandomWalk) -> str:
    policies = walk.api.list_objects("networkpolicies")
    if not policies:
        return ""
    walk.api.remove("networkpolicies", policies[0], by="a user")
    return "deleted"
