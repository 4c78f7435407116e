"""The steps of the random walk: what people, workers, machines, the network and death may do to a run, and how often.

Each says in words what it did, or nothing when there was nothing to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sailvl_operator.api import names
from sailvl_trainer.contract import ExitCode
from tests.support.simulation.api import may_run
from tests.support.simulation.users import (
    append_a_stage,
    ask_for_a_restart,
    create_the_run,
    delete_a_job,
    delete_a_pod,
    delete_the_run,
    delete_the_service,
    edit_a_gate,
    edit_the_image,
    edit_the_policy,
    edit_the_workers,
    mend_the_spec,
    replace_an_ended_run,
    resume,
    suspend,
    suspend_for_a_moment,
)

if TYPE_CHECKING:
    from tests.support.simulation.walk import Walk

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


def kueue_takes_a_place_away(walk: Walk) -> str:
    queued = [j for j in walk.api.all("jobs") if walk.cluster.is_queued(j) and not j["spec"]["suspend"]]
    if not queued:
        return ""
    job = walk.rng.choice(queued)
    walk.api.change("jobs", job, lambda new: new["spec"].update(suspend=True), by="kueue")
    return str(job["metadata"]["name"])


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
