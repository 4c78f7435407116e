"""The steps of the random walk: what users, workers, nodes, the network and crashes may do to a run, and how often.

Each returns a description of what it did, or an empty string if it was not possible.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sailvl_operator.api import names
from sailvl_trainer.contract import ExitCode
from tests.support.apiserver.objects import is_active
from tests.support.simulation.users import (
    append_stage,
    create_run,
    delete_job,
    delete_network_policy,
    delete_pod,
    delete_run,
    delete_service,
    edit_gate,
    edit_image,
    edit_network,
    edit_restart_policy,
    edit_workers,
    fix_spec,
    replace_finished_run,
    request_restart,
    resume,
    suspend,
    suspend_briefly,
)

if TYPE_CHECKING:
    from tests.support.simulation.walk import RandomWalk

_EXIT_CODES = (
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
"""Exit codes of failing workers, with their weights."""


def preempt_by_kueue(walk: RandomWalk) -> str:
    queued = [j for j in walk.api.list_objects("jobs") if walk.cluster.is_queued(j) and not j["spec"]["suspend"]]
    if not queued:
        return ""
    job = walk.rng.choice(queued)
    walk.api.update("jobs", job, lambda new: new["spec"].update(suspend=True), by="kueue")
    return str(job["metadata"]["name"])


def evict_pod(walk: RandomWalk) -> str:
    pod = walk.draw_pod(lambda p: is_active(p) and bool(p["spec"].get("nodeName")))
    if pod is None:
        return ""
    walk.cluster.evict(pod, walk.rng.choice(["EvictionByEvictionAPI", "PreemptionByScheduler"]))
    return str(pod["metadata"]["name"])


def disconnect_node(walk: RandomWalk) -> str:
    node = walk.cluster.nodes[walk.rng.choice(sorted(walk.cluster.nodes))]
    if (
        sum(n.unreachable_since is not None for n in walk.cluster.nodes.values()) > 1
        or node.unreachable_since is not None
    ):
        return ""
    walk.cluster.disconnect(node)
    walk.cluster.call_later(5.0, 900.0, walk.cluster.reconnect, node)
    return node.name


def remove_node(walk: RandomWalk) -> str:
    """Remove a node for good; the pod garbage collector ends its pods, and an empty node replaces it."""
    node = walk.rng.choice(sorted(walk.cluster.nodes))
    walk.cluster.remove_node(walk.cluster.nodes[node])
    return node


def reconnect_node(walk: RandomWalk) -> str:
    silent = [n for n in walk.cluster.nodes.values() if n.unreachable_since is not None]
    if not silent:
        return ""
    node = walk.rng.choice(silent)
    walk.cluster.reconnect(node)
    return node.name


def fill_cluster(walk: RandomWalk) -> str:
    walk.cluster.is_full = True
    walk.cluster.call_later(5.0, 500.0, lambda: setattr(walk.cluster, "is_full", False))
    return "for a while"


def remove_image(walk: RandomWalk) -> str:
    walk.cluster.is_image_missing = True
    walk.cluster.call_later(5.0, 500.0, lambda: setattr(walk.cluster, "is_image_missing", False))
    return "for a while"


def train_some_steps(walk: RandomWalk) -> str:
    gang = walk.draw_gang()
    if gang is None:
        return ""
    walk.cluster.workers.train(gang, walk.rng.randrange(1, 80), saves=walk.rng.random() < 0.4)
    return f"{gang.stage.stage} {gang.stage.attempt}: step {gang.step}"


def restart_ranks_in_place(walk: RandomWalk) -> str:
    gang = walk.draw_gang()
    if gang is None:
        return ""
    walk.cluster.workers.restart_in_place(gang)
    return f"{gang.stage.stage} {gang.stage.attempt}: step {gang.step}"


def finish_stage(walk: RandomWalk) -> str:
    gang = walk.draw_gang()
    if gang is None:
        return ""
    reports = walk.rng.random() < 0.9
    walk.cluster.workers.finish(gang, reports_result=reports)
    return f"{gang.stage.stage} {gang.stage.attempt}{'' if reports else ', the termination message is lost'}"


def fail_worker(walk: RandomWalk) -> str:
    pod = walk.draw_pod(lambda p: p["status"]["phase"] == "Running")
    if pod is None:
        return ""
    code = walk.rng.choices([c for c, _ in _EXIT_CODES], [w for _, w in _EXIT_CODES])[0]
    reason = "OOMKilled" if code == 137 and walk.rng.random() < 0.3 else "Error"
    message = walk.rng.choice([None, None, "", "Killed\n", '{"exit_code": 1, "mess'])
    walk.cluster.workers.crash(pod, int(code), reason=reason, message=message)
    return f"{pod['metadata']['name']}: {int(code)} {reason}"


def claim_preemption(walk: RandomWalk) -> str:
    """Let all workers exit as preempted as soon as they run, for a while."""
    walk.cluster.workers.claim_preemption = True
    walk.cluster.call_later(5.0, 500.0, lambda: setattr(walk.cluster.workers, "claim_preemption", False))
    return "for a while"


def degrade_network(walk: RandomWalk) -> str:
    conditions, draw = walk.network.conditions, walk.rng.choice
    conditions.error_rate, conditions.lost_answer_rate = draw([0.0, 0.1, 0.5]), draw([0.0, 0.1, 0.4])
    conditions.slow_rate, conditions.max_watch_delay_seconds = draw([0.0, 0.0, 0.1]), draw([0.05, 1.0, 20.0])
    walk.cluster.call_later(5.0, 200.0, conditions.reset)
    return str(conditions)


def cut_network(walk: RandomWalk) -> str:
    """Cut the operator off from the API server, half the time until the history has been compacted."""
    walk.network.conditions.error_rate, is_long = 1.0, walk.rng.random() < 0.5
    walk.network.cut_watches()

    def heal() -> None:
        walk.network.conditions.reset()
        if is_long:
            walk.api.compact()

    walk.cluster.call_later(1.0, 100.0, heal)
    return "until the history is compacted" if is_long else "for a while"


def occupy_name(walk: RandomWalk) -> str:
    """Create an object under a name that the operator may use next; remove it later."""
    stages = [s for s in walk.status.stages if s.state not in ("Succeeded", "Failed")]
    if not stages:
        return ""
    stage = walk.rng.choice(stages[:2])
    plural, name = walk.rng.choice(
        [
            ("services", "demo"),
            ("networkpolicies", "demo"),
            ("jobs", names.job_name("demo", stage.name, stage.attempt + 1)),
        ]
    )
    if walk.api.get(plural, "team", name) is not None:
        return ""
    metadata = {"name": name, "namespace": "team", "labels": {}}
    created = walk.api.create(
        plural, {"metadata": metadata, "spec": {"suspend": True, "completions": 0}}, by="another client"
    )
    walk.cluster.call_later(1.0, 300.0, walk.cluster.remove_if_present, plural, created["metadata"]["uid"])
    return f"{plural}/{name}"


def break_watch(walk: RandomWalk) -> str:
    if not walk.network.open_watches:
        return ""
    watch = walk.rng.choice(walk.network.open_watches)
    if walk.rng.random() < 0.2:
        watch.is_hanging = True
        return "it hangs"
    watch.cut()
    return "it is cut"


def compact_history(walk: RandomWalk) -> str:
    walk.api.compact()
    walk.network.cut_watches()
    return f"before {walk.api.oldest_version}"


async def kill_operator(walk: RandomWalk) -> str:
    if walk.operator is None:
        return ""
    await walk.kill_operator()
    if walk.rng.random() < 0.7:
        walk.start_operator()
        return "and starts again"
    return "and stays away"


def crash_operator_at_write(walk: RandomWalk) -> str:
    if walk.connection is None:
        return ""
    number, before = walk.rng.choice([1, 1, 2, 3]), walk.rng.random() < 0.5
    walk.connection.die_at_write(number, before=before)
    return f"{'before' if before else 'after'} {number} writes"


def start_operator(walk: RandomWalk) -> str:
    if walk.operator is not None:
        return ""
    walk.start_operator()
    return f"operator process {walk.operator_count}"


def jump_clock(walk: RandomWalk) -> str:
    seconds = walk.rng.choice([1.0, 30.0, 4000.0])
    walk.clock_offset_seconds += seconds
    return f"{seconds} s"


async def check_quiescence(walk: RandomWalk) -> str:
    await walk.check_quiescence()
    return "and nothing was written"


WalkStep = Callable[["RandomWalk"], str | Awaitable[str]]
STEPS: tuple[tuple[WalkStep, int], ...] = (
    (create_run, 40),
    (replace_finished_run, 20),
    (delete_run, 1),
    (suspend, 2),
    (suspend_briefly, 2),
    (resume, 8),
    (edit_workers, 2),
    (edit_restart_policy, 2),
    (edit_image, 1),
    (edit_gate, 1),
    (edit_network, 1),
    (fix_spec, 3),
    (request_restart, 1),
    (preempt_by_kueue, 3),
    (append_stage, 1),
    (delete_pod, 3),
    (delete_job, 1),
    (delete_service, 1),
    (delete_network_policy, 1),
    (evict_pod, 2),
    (disconnect_node, 2),
    (reconnect_node, 1),
    (remove_node, 1),
    (fill_cluster, 1),
    (remove_image, 1),
    (train_some_steps, 16),
    (restart_ranks_in_place, 1),
    (finish_stage, 8),
    (fail_worker, 8),
    (claim_preemption, 1),
    (degrade_network, 2),
    (cut_network, 1),
    (occupy_name, 1),
    (break_watch, 3),
    (compact_history, 1),
    (kill_operator, 2),
    (crash_operator_at_write, 4),
    (start_operator, 30),
    (jump_clock, 1),
    (check_quiescence, 1),
)
"""Each step with its weight."""
