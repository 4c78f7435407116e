"""The status of a SailVLRun, typed. States, condition types, reasons and causes are defined here and nowhere else.

Times are RFC 3339 strings in UTC; fractional numbers are decimal strings, as the Kubernetes API conventions require.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sailvl_operator.api.untrusted import MAX_COUNT, DocumentError, describe_error

_TIME = r"^([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z)?$"
_NUMBER = r"^-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]{1,3})?$"
_COST = r"^([0-9]+\.[0-9]{2})?$"
"""Patterns that the API server enforces. They are not checked again whenever a status is decoded, which would take most
of a reconcile's time; text that isn't a time or number raises DocumentError where it is parsed."""

Time = Annotated[str, Meta(max_length=32, extra_json_schema={"pattern": _TIME})]
Number = Annotated[str, Meta(max_length=32, extra_json_schema={"pattern": _NUMBER})]
Cost = Annotated[str, Meta(max_length=64, extra_json_schema={"pattern": _COST})]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Text = Annotated[str, Meta(max_length=1024)]
Short = Annotated[str, Meta(max_length=64)]

StageState = Literal["Pending", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]


class ConditionType(enum.StrEnum):
    """Types of the conditions of a run."""

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
    INVALID_STATUS = "InvalidStatus"
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
"""Key of in-place restarts (ranks restarted within an attempt) in status.stages[].restarts, beside the causes."""


class Cause(enum.StrEnum):
    """Why an attempt failed."""

    CONFIG = "Config"
    DATA = "Data"
    NON_FINITE = "NonFinite"
    OUT_OF_MEMORY = "OutOfMemory"
    STALLED = "Stalled"
    PREEMPTED = "Preempted"
    INFRA = "Infra"
    CRASH = "Crash"


class StatusStruct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of the status types: camelCase in JSON. Unknown fields, written by a later version, are ignored."""


class Condition(StatusStruct, frozen=True, kw_only=True, omit_defaults=False):
    """Condition of the run, as in the Kubernetes API conventions."""

    type: Short
    """Type of the condition: Succeeded, Failed, Running, Suspended, Stuck or GatesPassed."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Short
    """Machine-readable reason for the status, in CamelCase."""
    message: Text
    """Human-readable explanation of the status."""
    last_transition_time: Time
    """Time at which the status last changed."""
    observed_generation: Count
    """Generation of the spec from which the condition was computed."""


class StageProgress(StatusStruct, frozen=True, kw_only=True, omit_defaults=False):
    """Progress of a stage as its workers last reported it."""

    step: Count = 0
    """Number of units done: optimizer steps, samples or questions, by the kind of the stage."""
    steps: Count = 0
    """Total number of units; 0 if it is not known yet."""
    tokens: Count = 0
    """Number of tokens trained on, without padding, including those before a resume."""
    eta_seconds: Count | None = None
    """Estimated seconds until the stage completes. Unset if it is unknown."""
    seconds: Annotated[dict[str, Count], Meta(max_length=16)] = {}
    """Seconds that the workers of the newest attempt have spent, by goodput bucket."""
    unsaved_seconds: Count = 0
    """Seconds of training since the newest checkpoint, which a failure now would lose."""
    lost_steps: Count = 0
    """Number of optimizer steps that had to be repeated so far, over all attempts, because training resumed from an
    earlier checkpoint."""
    in_place_restarts: Count = 0
    """Number of times that the newest attempt restarted its ranks without replacing the pods."""


class StageCheckpoint(StatusStruct, frozen=True, kw_only=True):
    """Newest complete checkpoint of a stage."""

    step: Count
    """Optimizer step at which the checkpoint was written."""
    path: Annotated[str, Meta(max_length=1024)]
    """Directory of the checkpoint, relative to the storage."""


class LastFailure(StatusStruct, frozen=True, kw_only=True):
    """Most recent failure of a stage."""

    cause: Short
    """Cause of the failure: Config, Data, NonFinite, OutOfMemory, Stalled, Preempted, Infra or Crash."""
    attempt: Count
    """Number of the attempt that failed."""
    rank: Count | None = None
    """Rank that failed first. Unset if the failure is not attributed to a rank."""
    node: Annotated[str, Meta(max_length=253)] = ""
    """Node on which the failure occurred. Empty if it is not attributed to a node."""
    exit_code: int | None = None
    """Exit code of the worker. Unset if the worker did not exit."""
    message: Text = ""
    """Error message and, where known, how to fix the error."""
    traceback: Annotated[str, Meta(max_length=2048)] = ""
    """Last lines of the rank's traceback, or of its log if the rank exited without an error report."""
    time: Time
    """Time at which the failure was recorded."""


class StageGateResult(StatusStruct, frozen=True, kw_only=True, omit_defaults=False):
    """Result of a stage's gate."""

    passed: bool
    """Whether the metric keeps the bounds of the gate."""
    message: Text
    """Value of the metric and the bound that it was compared with."""


class StageStatus(StatusStruct, frozen=True, kw_only=True):
    """Observed state of one stage."""

    name: Annotated[str, Meta(max_length=30)]
    """Name of the stage."""
    state: StageState
    """Current state: Pending, Starting, Running, Restarting, Suspended, Succeeded or Failed."""
    attempt: Count = 0
    """Number of the newest attempt, counted from 1. It is written before the Job of the attempt is created, except for
    the first."""
    restarts: Annotated[dict[str, Count], Meta(max_length=16)] = {}
    """Number of restarts by the cause of the failure before them. The key InPlace counts restarts of ranks within an
    attempt."""
    counted_restarts: Annotated[dict[str, Count], Meta(max_length=16)] = {}
    """Number of restarts by cause that count against the budgets of restartPolicy: those since the saved progress last
    grew."""
    progress_at_last_failure: Count = 0
    """Saved progress, in units of progress.step, at the most recent counted restart."""
    short_attempts: Count = 0
    """Number of attempts in a row that failed within 30 seconds of their start. The backoff grows with it."""
    node_failures: Annotated[dict[str, Count], Meta(max_length=32)] = {}
    """Number of failed attempts by the node that caused the failure."""
    digest: Annotated[str, Meta(max_length=64)] = ""
    """Digest of the settings and inputs of the stage, by which its result is found on the storage."""
    reused: bool = False
    """Whether an existing result with the same digest was found on the storage instead of being computed."""
    start_time: Time = ""
    """Time at which the stage started."""
    completion_time: Time = ""
    """Time at which the stage succeeded or failed."""
    next_attempt_time: Time = ""
    """Earliest time at which the next attempt starts, after the backoff. Empty if no attempt is delayed."""
    progress: StageProgress | None = None
    """Progress as the workers last reported it."""
    metrics: Annotated[dict[str, Number], Meta(max_length=64)] = {}
    """Metrics of the stage, for example heldOutLoss or score, as decimal strings. Gates refer to their keys."""
    checkpoint: StageCheckpoint | None = None
    """Newest complete checkpoint."""
    output: Annotated[str, Meta(max_length=1024)] = ""
    """Output directory of the stage, relative to the storage."""
    gate_result: StageGateResult | None = None
    """Result of the stage's gate. Absent if the stage has no gate or the gate was not evaluated yet."""
    last_failure: LastFailure | None = None
    """Most recent failure of the stage."""


class Summary(StatusStruct, frozen=True, kw_only=True):
    """Columns of kubectl get."""

    stage: Annotated[str, Meta(max_length=48)] = ""
    """Current stage and its position among the stages, for example align (2/4)."""
    progress: Short = ""
    """Progress of the current stage in percent."""
    ready: Short = ""
    """Number of ready pods and of all pods of the current stage, for example 1/2."""
    restarts: Count = 0
    """Number of restarts of all stages."""
    goodput: Short = ""
    """Percentage of the time, without suspension, that was spent on training, curating or evaluating."""
    eta: Short = ""
    """Estimated time until the current stage completes."""
    reason: Short = ""
    """Reason of the condition that best describes the run."""


class Goodput(StatusStruct, frozen=True, kw_only=True):
    """Wall-clock time of the run by bucket. The whole seconds of all buckets add up to the time from start to
    settledAt."""

    settled_at: Time = ""
    """Time up to which the run is accounted for."""
    seconds: Annotated[dict[str, Count], Meta(max_length=16)] = {}
    """Seconds by bucket: queued, starting, training, curating, evaluating, dataWait, checkpoint, lost, restarting and
    suspended."""
    gpu_seconds: Annotated[dict[str, Count], Meta(max_length=16)] = {}
    """GPU seconds by bucket: the seconds multiplied by the number of GPUs held."""
    lost_steps: Count = 0
    """Number of optimizer steps that had to be repeated because training resumed from an earlier checkpoint."""
    cost: Cost = ""
    """Cost of all GPU seconds at spec.pricePerGpuHour. Empty if no price is set."""
    lost_cost: Cost = ""
    """Cost of the GPU seconds that were not spent on training, curating or evaluating."""


class Status(StatusStruct, frozen=True, kw_only=True):
    """Observed state of a SailVLRun."""

    observed_generation: Count = 0
    """Generation of the spec that the operator last acted upon."""
    start_time: Time = ""
    """Time at which the run started."""
    completion_time: Time = ""
    """Time at which the run succeeded or failed."""
    summary: Summary = Summary()
    """Columns of kubectl get."""
    conditions: Annotated[list[Condition], Meta(max_length=16)] = []
    """Conditions of the run."""
    stages: Annotated[list[StageStatus], Meta(max_length=32)] = []
    """Observed state of each stage, in the order of the spec."""
    goodput: Goodput = Goodput()
    """Wall-clock time and GPU time of the run by bucket."""
    observed_restart_request: Short = ""
    """Value of the annotation sailvl.dev/restart-stage that the operator last acted upon."""

    def condition(self, type_: ConditionType) -> Condition | None:
        """Return the condition of a type, or None if it was never set."""
        return next((c for c in self.conditions if c.type == type_), None)

    def is_true(self, type_: ConditionType) -> bool:
        """Whether the condition of a type is set and True."""
        found = self.condition(type_)
        return found is not None and found.status == "True"

    @property
    def is_finished(self) -> bool:
        """Whether the run has succeeded or failed."""
        return self.is_true(ConditionType.SUCCEEDED) or self.is_true(ConditionType.FAILED)


def decode_status(raw: dict[str, object]) -> Status:
    """Convert the status of a run as the API server holds it; fields of later versions are ignored.

    Raises DocumentError if a client wrote something that can't be used.
    """
    try:
        return msgspec.convert(raw, Status)
    except Exception as error:
        raise DocumentError(f"status is malformed: {describe_error(error)}") from error


def encode_status(status: Status) -> dict[str, object]:
    """Convert a status to JSON values, camelCase and without defaults."""
    encoded = msgspec.to_builtins(status)
    assert isinstance(encoded, dict)
    return encoded
