"""All faults, with what has to come of each: the rows of the table."""

from __future__ import annotations

from contextlib import nullcontext

from tests.faults import injections as do
from tests.faults.scene import Fault

TRAINING = ("pretrain", "sft")
GANG = {"inPlaceRestarts": 0}
NONE = Fault(name="none", words="no fault", inject=lambda _: nullcontext(), kinds=())
"""What the others are compared with."""
BAD_PICTURES = Fault(
    name="bad-data", words="raw images cut in half", inject=do.cut_pictures, kinds=("curate",),
    interrupts=False,
)  # fmt: skip
FAULTS = [
    Fault(name="rank", words="SIGKILL of a rank, with restarts in place", inject=do.kill_rank),
    Fault(name="rank-gang", words="SIGKILL of a rank", inject=do.kill_rank, cause="Crash", policy=GANG),
    Fault(name="agent", words="SIGKILL of a worker's PID 1", inject=do.kill_agent, cause="Crash"),
    Fault(name="container", words="a container killed by containerd", inject=do.kill_container, cause="Crash"),
    Fault(
        name="kubelet", words="SIGKILL of a kubelet and its pod", inject=do.kill_kubelet, cause="Infra",
        until="failed",
    ),
    Fault(name="delete", words="kubectl delete pod", inject=do.delete_pod, cause="Preempted"),
    Fault(name="evict", words="a pod evicted by the API", inject=do.evict_pod, cause="Preempted"),
    Fault(
        name="preempt", words="preemption by a pod of higher priority", inject=do.preempt, cause="Preempted",
        until="recovered",
    ),
    Fault(
        name="power", words="power loss of a node, later back", inject=do.cut_power, cause="Infra",
        until="failed", node=do.LOST_NODE,
    ),
    Fault(
        name="disk", words="volume full, later freed", inject=do.fill_disk, cause="Crash", until="failed",
        needs_disk=True,
    ),
    Fault(
        name="volume", words="volume unmounted, later back", inject=do.take_volume, cause="Crash", until="stuck",
        stuck="VolumeNotReady", needs_disk=True,
    ),
    Fault(
        name="memory", words="container out of memory", inject=do.run_out_of_memory, cause="OutOfMemory",
        policy=GANG,
    ),
    Fault(
        name="image", words="image missing at a restart, later back", inject=do.take_image, cause="Crash",
        until="stuck", stuck="ImagePullFailed", needs_copy=True,
    ),
    Fault(
        name="nan", words="NaN in a rank's memory", inject=do.spoil_memory, cause="NonFinite", kinds=TRAINING,
    ),
    Fault(
        name="hang", words="SIGSTOP of a rank", inject=do.freeze, cause="Stalled", policy={"stallTimeoutSeconds": 30},
    ),
    Fault(
        name="bad-data", words="corrupt shard or benchmark, later repaired", inject=do.garble, cause="Data",
        until="over", kinds=(*TRAINING, "evaluate"), in_curation=BAD_PICTURES,
    ),
    Fault(
        name="operators", words="SIGKILL of a rank and of all operators", inject=do.kill_operators, cause="Crash",
        policy=GANG,
    ),
]  # fmt: skip
