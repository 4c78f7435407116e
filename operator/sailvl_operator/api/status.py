"""The status of a SailVLRun, typed: states, conditions and reasons have their names here and nowhere else.

Times are RFC 3339 strings in UTC; numbers with a fraction are decimal strings, as Kubernetes' API conventions ask.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Time = Annotated[str, Meta(max_length=32)]
Text = Annotated[str, Meta(max_length=1024)]
Short = Annotated[str, Meta(max_length=64)]

StageState = Literal["Pending", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]


class ConditionType(enum.StrEnum):
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    STUCK = "Stuck"
    GATES_PASSED = "GatesPassed"


class Reason(enum.StrEnum):
    """Reasons of conditions and events."""

    PENDING = "Pending"
    RUNNING = "Running"
    STARTING = "Starting"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    COMPLETED = "Completed"
    INVALID_SPEC = "InvalidSpec"
    STAGE_STARTED = "StageStarted"
    STAGE_SUCCEEDED = "StageSucceeded"
    STAGE_FAILED = "StageFailed"
    GATE_PASSED = "GatePassed"
    GATE_FAILED = "GateFailed"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RESTARTED_IN_PLACE = "RestartedInPlace"
    RESTART_REQUESTED = "RestartRequested"
    NODE_EXCLUDED = "NodeExcluded"
    NAME_CONFLICT = "NameConflict"
    FORBIDDEN = "Forbidden"
    REJECTED = "Rejected"
    QUOTA = "QuotaExceeded"
    ADMISSION = "AdmissionDenied"
    QUEUED = "Queued"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    VOLUME_NOT_READY = "VolumeNotReady"
    GATE_NOT_PASSED = "GateNotPassed"
    NOT_STUCK = "NotStuck"


IN_PLACE = "InPlace"
"""Among the causes of restarts: ranks that were started again within an attempt."""


class Cause(enum.StrEnum):
    """Why an attempt ended without a result."""

    CONFIG = "Config"
    DATA = "Data"
    NON_FINITE = "NonFinite"
    OUT_OF_MEMORY = "OutOfMemory"
    STALLED = "Stalled"
    PREEMPTED = "Preempted"
    INFRA = "Infra"
    CRASH = "Crash"


class Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of the status' structs: camelCase outside; unknown fields of a later version are passed over."""


class Condition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    type: Short
    status: Literal["True", "False", "Unknown"]
    reason: Short
    message: Text
    last_transition_time: Time
    observed_generation: int


class StageProgress(Struct, frozen=True, kw_only=True, omit_defaults=False):
    step: int = 0
    """Optimizer steps, samples or questions done."""
    steps: int = 0
    """How many there will be; 0: not known yet."""
    tokens: int = 0
    eta_seconds: int | None = None
    seconds: Annotated[dict[str, int], Meta(max_length=16)] = {}
    """Seconds of the newest attempt's workers by bucket, as they were last read."""
    unsaved_seconds: int = 0
    """Seconds of training since the newest checkpoint: what a failure would cost."""
    lost_steps: int = 0
    """Steps done in vain by all attempts so far: those after a checkpoint that was gone on from."""
    in_place_restarts: int = 0
    """How often the newest attempt's ranks were started again within it."""


class StageCheckpoint(Struct, frozen=True, kw_only=True):
    step: int
    path: Annotated[str, Meta(max_length=1024)]
    """Relative to the storage."""


class LastFailure(Struct, frozen=True, kw_only=True):
    cause: Short
    attempt: int
    rank: int | None = None
    node: Annotated[str, Meta(max_length=253)] = ""
    exit_code: int | None = None
    message: Text = ""
    traceback: Annotated[str, Meta(max_length=2048)] = ""
    """The last lines of the rank's traceback; of its log, if it had no time for words of its own."""
    time: Time


class StageStatus(Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(max_length=30)]
    state: StageState
    attempt: int = 0
    """Number of the newest attempt; written before its Job exists."""
    restarts: Annotated[dict[str, int], Meta(max_length=16)] = {}
    """New attempts by the cause of the failure before them; InPlace: ranks started again within an attempt."""
    counted_restarts: Annotated[dict[str, int], Meta(max_length=16)] = {}
    """Those of them that count against the budgets: since the saved progress last grew."""
    progress_at_last_failure: int = 0
    """The saved progress at the last of them."""
    node_failures: Annotated[dict[str, int], Meta(max_length=32)] = {}
    """Attempts that a node took down."""
    digest: Annotated[str, Meta(max_length=64)] = ""
    reused: bool = False
    """The result was found on the storage, not computed again."""
    start_time: Time = ""
    completion_time: Time = ""
    next_attempt_time: Time = ""
    """The next attempt starts at this time: backoff."""
    progress: StageProgress | None = None
    metrics: Annotated[dict[str, Annotated[str, Meta(max_length=32)]], Meta(max_length=64)] = {}
    checkpoint: StageCheckpoint | None = None
    output: Annotated[str, Meta(max_length=1024)] = ""
    """Directory of the stage, relative to the storage."""
    gate: Text = ""
    """What became of the stage's gate, in words; empty: it has none, or it was not come to yet."""
    last_failure: LastFailure | None = None


class Summary(Struct, frozen=True, kw_only=True):
    """The columns of `kubectl get`."""

    stage: Annotated[str, Meta(max_length=48)] = ""
    progress: Short = ""
    ready: Short = ""
    restarts: int = 0
    goodput: Short = ""
    eta: Short = ""
    reason: Short = ""


class Goodput(Struct, frozen=True, kw_only=True):
    """Where the time went: whole seconds by bucket, which add up to the time from start to `settledAt`."""

    settled_at: Time = ""
    seconds: Annotated[dict[str, int], Meta(max_length=16)] = {}
    gpu_seconds: Annotated[dict[str, int], Meta(max_length=16)] = {}
    lost_steps: int = 0
    """Steps done in vain: those after a checkpoint that was gone on from, as the workers count them."""
    cost: Short = ""
    """Of all GPU seconds at spec.pricePerGpuHour."""
    lost_cost: Short = ""
    """Of those that were not for training, curating or evaluating."""


class Status(Struct, frozen=True, kw_only=True):
    observed_generation: int = 0
    start_time: Time = ""
    completion_time: Time = ""
    summary: Summary = Summary()
    conditions: Annotated[list[Condition], Meta(max_length=16)] = []
    stages: Annotated[list[StageStatus], Meta(max_length=32)] = []
    goodput: Goodput = Goodput()
    observed_restart_request: Short = ""
    """The value of the annotation sailvl.dev/restart-stage that was acted upon."""

    def condition(self, type_: ConditionType) -> Condition | None:
        """The condition of a type, if it was ever set."""
        return next((c for c in self.conditions if c.type == type_), None)

    def is_true(self, type_: ConditionType) -> bool:
        """Whether a condition is set and True."""
        found = self.condition(type_)
        return found is not None and found.status == "True"

    @property
    def is_finished(self) -> bool:
        """Succeeded or failed for good: latched."""
        return self.is_true(ConditionType.SUCCEEDED) or self.is_true(ConditionType.FAILED)
