"""The steps of the random walk: what people, workers, machines, the network and death may do to a run, and how often.

Each says in words what it did, or nothing when there was nothing to do.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from builders import build_document
from model_api import may_run
from sailvl_operator.api import names
from sailvl_operator.api.status import ConditionType
from sailvl_trainer.contract import ExitCode

if TYPE_CHECKING:
    from random_walk import Walk

_POLICY = {"maxRestarts": 6, "maxInfraRestarts": 100, "startTimeoutSeconds": 300}
_ENDS = (
    (ExitCode.CONFIG, 1),
    (ExitCode.DATA, 1),
    (ExitCode.NON_FINITE, 3),
    (ExitCode.OUT_OF_MEMORY, 2),
    (ExitCode.STALLED, 4),
    (ExitCode.PREEMPTED, 5),
    (ExitCode.PEER_LOST, 4),
    (ExitCode.TERMINATED, 4),
    (126, 1),
    (127, 1),
    (1, 5),
    (137, 4),
    (139, 4),
)
"""Exit codes and how often."""


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


def kueue_takes_a_place_away(walk: Walk) -> str:
    queued = [j for j in walk.api.all("jobs") if walk.cluster.is_queued(j) and not j["spec"]["suspend"]]
    if not queued:
        return ""
    job = walk.rng.choice(queued)
    walk.api.change("jobs", job, lambda new: new["spec"].update(suspend=True), by="kueue")
    return str(job["metadata"]["name"])


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


def evict_a_pod(walk: Walk) -> str:
    pod = walk.pod(lambda p: may_run(p) and bool(p["spec"].get("nodeName")))
    if pod is None:
        return ""
    walk.cluster.evict(pod, walk.rng.choice(["EvictionByEvictionAPI", "PreemptionByScheduler"]))
    return str(pod["metadata"]["name"])


def lose_a_node(walk: Walk) -> str:
    node = walk.cluster.nodes[walk.rng.choice(sorted(walk.cluster.nodes))]
    if sum(n.silent_since is not None for n in walk.cluster.nodes.values()) > 1 or node.silent_since is not None:
        return ""
    walk.cluster.silence(node)
    walk.cluster.later(5.0, 900.0, walk.cluster.bring_back, node)
    return node.name


def a_node_is_removed(walk: Walk) -> str:
    """For good; the garbage collector of pods ends what was on it. Another takes its place."""
    node = walk.rng.choice(sorted(walk.cluster.nodes))
    walk.cluster.remove(walk.cluster.nodes[node])
    return node


def a_node_returns(walk: Walk) -> str:
    silent = [n for n in walk.cluster.nodes.values() if n.silent_since is not None]
    if not silent:
        return ""
    node = walk.rng.choice(silent)
    walk.cluster.bring_back(node)
    return node.name


def the_cluster_is_full(walk: Walk) -> str:
    walk.cluster.is_full = True
    walk.cluster.later(5.0, 500.0, lambda: setattr(walk.cluster, "is_full", False))
    return "for a while"


def the_image_is_gone(walk: Walk) -> str:
    walk.cluster.is_image_gone = True
    walk.cluster.later(5.0, 500.0, lambda: setattr(walk.cluster, "is_image_gone", False))
    return "for a while"


def workers_work(walk: Walk) -> str:
    gang = walk.gang()
    if gang is None:
        return ""
    walk.cluster.workers.work(gang, walk.rng.randrange(1, 80), saves=walk.rng.random() < 0.4)
    return f"{gang.document.stage} {gang.document.attempt}: step {gang.step}"


def ranks_restart_in_place(walk: Walk) -> str:
    gang = walk.gang()
    if gang is None:
        return ""
    walk.cluster.workers.restart_in_place(gang)
    return f"{gang.document.stage} {gang.document.attempt}: step {gang.step}"


def workers_succeed(walk: Walk) -> str:
    gang = walk.gang()
    if gang is None:
        return ""
    says = walk.rng.random() < 0.9
    walk.cluster.workers.finish(gang, says_result=says)
    return f"{gang.document.stage} {gang.document.attempt}{'' if says else ', the message is lost'}"


def a_worker_fails(walk: Walk) -> str:
    pod = walk.pod(lambda p: p["status"]["phase"] == "Running")
    if pod is None:
        return ""
    code = walk.rng.choices([c for c, _ in _ENDS], [w for _, w in _ENDS])[0]
    reason = "OOMKilled" if code == 137 and walk.rng.random() < 0.3 else "Error"
    message = walk.rng.choice([None, None, "", "Killed\n", '{"exit_code": 1, "mess'])
    walk.cluster.workers.crash(pod, int(code), reason=reason, message=message)
    return f"{pod['metadata']['name']}: {int(code)} {reason}"


def the_api_is_troubled(walk: Walk) -> str:
    weather, draw = walk.weather, walk.rng.choice
    weather.refused, weather.lost, weather.slow = draw([0.0, 0.1, 0.5]), draw([0.0, 0.1, 0.4]), draw([0.0, 0.0, 0.1])
    weather.lag = draw([0.05, 1.0, 20.0])
    walk.cluster.later(5.0, 200.0, weather.clear_up)
    return str(weather)


def the_network_is_cut(walk: Walk) -> str:
    """Between the operator and the API server; perhaps for longer than history lasts."""
    walk.weather.refused, is_long = 1.0, walk.rng.random() < 0.5
    for watch in walk.api.watches:
        watch.cut()

    def heal() -> None:
        walk.weather.clear_up()
        if is_long:
            walk.api.forget_history()

    walk.cluster.later(1.0, 100.0, heal)
    return "for long" if is_long else "for a while"


def a_stranger_takes_a_name(walk: Walk) -> str:
    """Of a Job or of the Service that the operator may want to make; for a while."""
    stages = [s for s in walk.status.stages if s.state not in ("Succeeded", "Failed")]
    if not stages:
        return ""
    stage = walk.rng.choice(stages[:2])
    plural, name = walk.rng.choice(
        [("services", "demo"), ("jobs", names.job_name("demo", stage.name, stage.attempt + 1))]
    )
    if walk.api.get(plural, "team", name) is not None:
        return ""
    metadata = {"name": name, "namespace": "team", "labels": {}}
    made = walk.api.create(plural, {"metadata": metadata, "spec": {"suspend": True, "completions": 0}}, by="a stranger")
    walk.cluster.later(1.0, 300.0, walk.cluster.remove_if_there, plural, made["metadata"]["uid"])
    return f"{plural}/{name}"


def a_watch_breaks(walk: Walk) -> str:
    if not walk.api.watches:
        return ""
    watch = walk.rng.choice(walk.api.watches)
    if walk.rng.random() < 0.2:
        watch.is_hanging = True
        return "it hangs"
    watch.cut()
    return "it is cut"


def history_is_compacted(walk: Walk) -> str:
    walk.api.forget_history()
    for watch in walk.api.watches:
        watch.cut()
    return f"before {walk.api.oldest_version}"


async def the_operator_is_killed(walk: Walk) -> str:
    if walk.operator is None:
        return ""
    await walk.end()
    if walk.rng.random() < 0.7:
        walk.start()
        return "and starts again"
    return "and stays away"


def the_operator_will_die_at_a_write(walk: Walk) -> str:
    if walk.wire is None:
        return ""
    number, before = walk.rng.choice([1, 1, 2, 3]), walk.rng.random() < 0.5
    walk.wire.die_at_write(number, before=before)
    return f"{'before' if before else 'after'} {number} writes"


def the_operator_starts(walk: Walk) -> str:
    if walk.operator is not None:
        return ""
    walk.start()
    return f"life {walk.lives}"


def the_clock_jumps(walk: Walk) -> str:
    seconds = walk.rng.choice([1.0, 30.0, 4000.0])
    walk.jumped += seconds
    return f"{seconds} s"


async def all_calms_down(walk: Walk) -> str:
    await walk.calm()
    return "and nothing was written"


Step = Callable[["Walk"], str | Awaitable[str]]
STEPS: tuple[tuple[Step, int], ...] = (
    (create_the_run, 40),
    (replace_an_ended_run, 20),
    (delete_the_run, 1),
    (suspend, 2),
    (suspend_for_a_moment, 2),
    (resume, 8),
    (edit_the_workers, 2),
    (edit_the_policy, 2),
    (edit_the_image, 1),
    (edit_a_gate, 1),
    (mend_the_spec, 3),
    (ask_for_a_restart, 1),
    (kueue_takes_a_place_away, 3),
    (append_a_stage, 1),
    (delete_a_pod, 3),
    (delete_a_job, 1),
    (delete_the_service, 1),
    (evict_a_pod, 2),
    (lose_a_node, 2),
    (a_node_returns, 1),
    (a_node_is_removed, 1),
    (the_cluster_is_full, 1),
    (the_image_is_gone, 1),
    (workers_work, 16),
    (ranks_restart_in_place, 1),
    (workers_succeed, 8),
    (a_worker_fails, 8),
    (the_api_is_troubled, 2),
    (the_network_is_cut, 1),
    (a_stranger_takes_a_name, 1),
    (a_watch_breaks, 3),
    (history_is_compacted, 1),
    (the_operator_is_killed, 2),
    (the_operator_will_die_at_a_write, 4),
    (the_operator_starts, 30),
    (the_clock_jumps, 1),
    (all_calms_down, 1),
)
"""And how often, where they are possible."""
