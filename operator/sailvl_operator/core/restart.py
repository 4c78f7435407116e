"""Whether a failed attempt is followed by another: budgets and backoff by cause."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sailvl_operator.api.defaults import Defaults
from sailvl_operator.api.status import Cause, StageStatus
from sailvl_operator.api.types import RestartPolicy

_ADVICE = {
    Cause.CONFIG: "change the settings that the message names",
    Cause.DATA: "mend or remove the record that the message names",
    Cause.NON_FINITE: "lower learningRate or look at the data of the last step",
    Cause.OUT_OF_MEMORY: "raise the memory limit, or lower packTokens or packTiles",
}


def budget(cause: Cause, policy: RestartPolicy) -> int | None:
    """How many restarts a cause allows; None: any number."""
    budgets: dict[Cause, int | None] = {
        Cause.CONFIG: 0,
        Cause.DATA: 0,
        Cause.NON_FINITE: 3,
        Cause.OUT_OF_MEMORY: 1,
        Cause.PREEMPTED: None,
        Cause.INFRA: policy.max_infra_restarts,
        Cause.STALLED: policy.max_restarts,
        Cause.CRASH: policy.max_restarts,
    }
    return budgets[cause]


def may_restart(cause: Cause, restarts: Mapping[str, int], policy: RestartPolicy) -> bool:
    """Whether the budget of the cause, given the restarts so far, allows one more. Crashes and stalls share theirs."""
    allowed = budget(cause, policy)
    if allowed is None:
        return True
    shared = (Cause.STALLED, Cause.CRASH) if cause in (Cause.STALLED, Cause.CRASH) else (cause,)
    return sum(restarts.get(c, 0) for c in shared) < allowed


def backoff_seconds(cause: Cause, restarts: Mapping[str, int], key: str, defaults: Defaults) -> float:
    """Wait before the next attempt: none when the machine was at fault, else doubling.

    The jitter of up to a quarter is drawn from `key`, so that a restarted operator waits as long.
    """
    if cause in (Cause.PREEMPTED, Cause.INFRA) and restarts.get(cause, 0) < 3:
        return 0.0
    doubled = defaults.backoff_seconds * 2.0 ** min(restarts.get(cause, 0), 10)
    jitter = hashlib.sha256(key.encode()).digest()[0] / 255 / 4
    return float(min(doubled, defaults.backoff_limit_seconds) * (1 + jitter))


def avoided_nodes(status: StageStatus, policy: RestartPolicy) -> tuple[str, ...]:
    """Machines that get no more workers of a stage, by name: each took `maxFailuresPerNode` attempts down."""
    if not policy.max_failures_per_node:
        return ()
    return tuple(sorted(node for node, n in status.node_failures.items() if n >= policy.max_failures_per_node))


def advice(cause: Cause) -> str:
    """What a person can do about it; empty when nothing is known."""
    return _ADVICE.get(cause, "")
