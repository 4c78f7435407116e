"""All faults with their expected effects: the rows of the fault table."""

from __future__ import annotations

from contextlib import nullcontext

from tests.faults.injections import actions
from tests.faults.runs.experiment import Fault

TRAINING = ("pretrain", "sft")
GANG = {"inPlaceRestarts": 0}
NONE = Fault(name="none", title="no fault", inject=lambda _: nullcontext(), kinds=())
"""The undisturbed run that the others are compared with."""
TRUNCATED_IMAGES = Fault(
    name="bad-data",
    title="raw images cut in half",
    inject=actions.truncate_images,
    kinds=("curate",),
    interrupts=False,
)
FAULTS = [
    Fault(name="rank", title="SIGKILL of a rank, with restarts in place", inject=actions.kill_rank),
    Fault(name="rank-gang", title="SIGKILL of a rank", inject=actions.kill_rank, cause="Crash", policy=GANG),
    Fault(name="agent", title="SIGKILL of a worker's PID 1", inject=actions.kill_agent, cause="Crash"),
    Fault(name="container", title="a container killed by containerd", inject=actions.kill_container, cause="Crash"),
    Fault(
        name="kubelet",
        title="SIGKILL of a kubelet and its pod",
        inject=actions.kill_kubelet,
        cause="Infra",
        revert_when="failed",
    ),
    Fault(name="delete", title="kubectl delete pod", inject=actions.delete_pod, cause="Preempted"),
    Fault(name="evict", title="a pod evicted by the API", inject=actions.evict_pod, cause="Preempted"),
    Fault(
        name="preempt",
        title="preemption by a pod of higher priority",
        inject=actions.preempt,
        cause="Preempted",
        revert_when="recovered",
    ),
    Fault(
        name="power",
        title="power loss of a node, later back",
        inject=actions.cut_power,
        cause="Infra",
        revert_when="failed",
        node=actions.UNSTABLE_NODE,
    ),
    Fault(
        name="disk",
        title="volume full, later freed",
        inject=actions.fill_disk,
        cause="Crash",
        revert_when="failed",
        needs_disk=True,
    ),
    Fault(
        name="volume",
        title="volume unmounted, later back",
        inject=actions.remove_volume,
        cause="Crash",
        revert_when="stuck",
        stuck="VolumeNotReady",
        needs_disk=True,
    ),
    Fault(
        name="memory",
        title="container out of memory",
        inject=actions.run_out_of_memory,
        cause="OutOfMemory",
        policy=GANG,
    ),
    Fault(
        name="image",
        title="image missing at a restart, later back",
        inject=actions.remove_image,
        cause="Crash",
        revert_when="stuck",
        stuck="ImagePullFailed",
        needs_image_copy=True,
    ),
    Fault(
        name="nan",
        title="NaN in a rank's memory",
        inject=actions.write_nan_to_memory,
        cause="NonFinite",
        kinds=TRAINING,
    ),
    Fault(
        name="hang",
        title="SIGSTOP of a rank",
        inject=actions.stop_rank,
        cause="Stalled",
        policy={"stallTimeoutSeconds": 30},
    ),
    Fault(
        name="bad-data",
        title="corrupt shard or benchmark, later repaired",
        inject=actions.corrupt_input,
        cause="Data",
        revert_when="run failed",
        kinds=(*TRAINING, "evaluate"),
        in_curation=TRUNCATED_IMAGES,
    ),
    Fault(
        name="operators",
        title="SIGKILL of a rank and of all operators",
        inject=actions.kill_operators,
        cause="Crash",
        policy=GANG,
    ),
]
