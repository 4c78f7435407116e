"""A worker's process: its environment variables, ports, timing and exit codes."""

from __future__ import annotations

import enum

METRICS_PORT = 9400
"""Port on which every worker serves /metrics (Prometheus), /progress (JSON) and /healthz."""
RENDEZVOUS_PORT = 29500
"""Port of torch's rendezvous store, on the worker of index 0."""
TERMINATION_MESSAGE_BYTES = 4096
"""Longest termination message, in bytes; the kubelet truncates a longer one, which would break the JSON."""
WATCHDOG_INTERVAL_SECONDS = 5.0
"""Seconds between two checks of a worker's watchdog: workers that stall together exit within so long of each other."""


class ExitCode(enum.IntEnum):
    """Exit codes of a worker's container. It is the code of the rank that failed first, or the worker's own."""

    OK = 0
    """The stage succeeded; the result is in the termination message of the worker of index 0."""
    CONFIG = 64
    """The settings can't work; another attempt with the same settings fails too."""
    DATA = 65
    """A shard or a sample is unreadable; the message names it."""
    NON_FINITE = 66
    """The loss or the gradient norm is NaN or infinite; the next attempt skips the data of that step."""
    OUT_OF_MEMORY = 67
    """The accelerator or the container ran out of memory."""
    STALLED = 68
    """A rank sent no heartbeat for the stall timeout, or no rank was started in time."""
    STORAGE = 74
    """A volume is full or unavailable. To the operator it is a crash: after a backoff, a new attempt starts, whose pods
    mount the volume anew. The number is EX_IOERR of <sysexits.h>."""
    PREEMPTED = 75
    """SIGTERM arrived and a checkpoint was saved, or there was no work to lose; or a later attempt superseded this
    one."""
    PEER_LOST = 76
    """The connection to another worker or rank was lost; the cause is the other one's error."""
    TERMINATED = 143
    """SIGTERM arrived and no checkpoint was saved within the grace period; steps are lost."""


NON_RETRYABLE_EXIT_CODES: frozenset[int] = frozenset(
    {ExitCode.CONFIG, ExitCode.DATA, ExitCode.NON_FINITE, ExitCode.PREEMPTED, ExitCode.STORAGE}
)
"""Exit codes of ranks after which restarting the ranks in place can't help."""


class Env(enum.StrEnum):
    """Environment variables of a worker's container. Only STAGE_FILE is required."""

    STAGE_FILE = "SAILVL_STAGE_FILE"
    """Path of the stage config (`Stage` as JSON)."""
    NODES = "SAILVL_NODES"
    """Number of workers of the attempt. Default 1."""
    NODE_RANK = "SAILVL_NODE_RANK"
    """Index of this worker, 0 <= index < nodes. Default 0."""
    NODE_NAME = "SAILVL_NODE_NAME"
    """Name of the machine, for logs and messages. Default: empty."""
    PROCESSES_PER_NODE = "SAILVL_PROCESSES_PER_NODE"
    """Number of ranks per worker: its GPUs, or 1 on the CPU. Default 1."""
    DEVICE = "SAILVL_DEVICE"
    """Device that ranks use: cuda or cpu. Default cpu."""
    RENDEZVOUS_HOST = "SAILVL_RENDEZVOUS_HOST"
    """Host name or address of the worker of index 0. Default localhost."""
    RENDEZVOUS_PORT = "SAILVL_RENDEZVOUS_PORT"
    """Port of the rendezvous store. Default RENDEZVOUS_PORT."""
    METRICS_PORT = "SAILVL_METRICS_PORT"
    """Port of the worker's HTTP server, before the offset below. Default METRICS_PORT."""
    METRICS_PORT_OFFSET = "SAILVL_METRICS_PORT_OFFSET"
    """Number added to METRICS_PORT: workers that share a machine set it to their index. Default 0."""
    IN_PLACE_RESTARTS = "SAILVL_IN_PLACE_RESTARTS"
    """How often the ranks may be restarted within the attempt, without a new pod. Default 0."""
    GRACE_SECONDS = "SAILVL_GRACE_SECONDS"
    """Seconds between SIGTERM and the worker's exit, in which the ranks save a checkpoint. Default 30."""
    STALL_TIMEOUT_SECONDS = "SAILVL_STALL_TIMEOUT_SECONDS"
    """Seconds without a heartbeat of a rank after which the worker exits with STALLED. Default 0: never."""
    TERMINATION_LOG = "SAILVL_TERMINATION_LOG"
    """Path of the termination message. Default /dev/termination-log."""
    SCRATCH = "SAILVL_SCRATCH"
    """Writable directory that only this worker uses and that is lost with it. Default /tmp/sailvl."""
