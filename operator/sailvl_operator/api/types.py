"""The spec of a SailVLRun, typed, and the defaults of an installation.

A resource is parsed once, at the edge, into these frozen structs. `crd.py` turns them into the
CustomResourceDefinition; the docstring under a field is its description in the schema and in the reference. The
Kubernetes API conventions forbid floats, so fractional numbers are decimal strings; large counts may carry a suffix
(131B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api import names
from sailvl_operator.api.scalars import (
    BY_NAME,
    IMAGE,
    SET,
    Decimal,
    Name,
    ObjectName,
    Quantity,
    Seconds,
    Struct,
    Weights,
)
from sailvl_operator.api.stages import Curate, Evaluate, Pretrain, Sft
from sailvl_operator.api.workers import Workers as Workers  # noqa: PLC0414  # part of these types


class VolumeClaimResources(Struct, frozen=True, kw_only=True):
    """Resources of a PersistentVolumeClaim, as in the Kubernetes API."""

    requests: Annotated[dict[str, Quantity], Meta(max_length=4)]
    """Requested resources. The key storage, the size of the volume, is required."""


class VolumeClaimTemplate(Struct, frozen=True, kw_only=True):
    """Template of the PersistentVolumeClaim <run>-storage, which the operator creates for the run."""

    storage_class_name: ObjectName | UnsetType = UNSET
    """Name of the StorageClass. Defaults to the default class of the cluster."""
    access_modes: Annotated[tuple[Literal["ReadWriteMany", "ReadWriteOnce"], ...], Meta(max_length=2)] = (
        "ReadWriteMany",
    )
    """Access modes of the volume. Stages with more than one node need ReadWriteMany."""
    resources: VolumeClaimResources
    """Resources of the claim, including its size."""


class Storage(Struct, frozen=True, kw_only=True):
    """Storage of the run: an existing claim (volumeClaim) or one that the operator creates (volumeClaimTemplate)."""

    volume_claim: ObjectName | UnsetType = UNSET
    """Name of an existing PersistentVolumeClaim in the namespace of the run. It is mounted at /data in every worker."""
    volume_claim_template: VolumeClaimTemplate | UnsetType = UNSET
    """PersistentVolumeClaim to create for this run. It is mounted at /data in every worker."""
    when_deleted: Literal["Retain", "Delete"] = "Retain"
    """Retention policy of the claim created from volumeClaimTemplate, and of all outputs on it, when the run is
    deleted. A retained claim is adopted by a later run of the same name. Claims named by volumeClaim are never
    deleted."""


class Network(Struct, frozen=True, kw_only=True):
    """Network access to the workers."""

    policy: Literal["Enabled", "Disabled"] = "Enabled"
    """Whether the operator creates a NetworkPolicy for the run. It admits connections from workers of the same run, and
    on the metrics port from the operator and from Prometheus. All others are refused, if the network plugin of the
    cluster enforces NetworkPolicies. It may be changed at any time."""


class Model(Struct, frozen=True, kw_only=True):
    """Model to train: a vision tower, a two-layer connector after a 2x2 pixel shuffle, and a language model."""

    preset: Literal["tiny", "sail-vl-2b", "sail-vl-8b", "sail-vl2-2b"]
    """Name of the model architecture."""
    vision: Weights | UnsetType = UNSET
    """Pretrained weights of the vision tower: a directory on the storage or a Hugging Face Hub ID. Defaults to random
    initialization."""
    language: Weights | UnsetType = UNSET
    """Pretrained weights of the language model: a directory on the storage or a Hugging Face Hub ID. Defaults to random
    initialization."""


class EngineSpec(Struct, frozen=True, kw_only=True):
    """Engine for distributed training."""

    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """Library that shards the optimizer state, gradients and parameters."""
    zero_stage: Annotated[int, Meta(ge=1, le=3)] = 1
    """ZeRO stage of DeepSpeed: 1 shards the optimizer state over the data-parallel ranks, 2 also the gradients, 3 also
    the parameters."""


class RestartPolicy(Struct, frozen=True, kw_only=True):
    """Restart budgets of each stage, by the cause of the failure, and the timeouts that detect a failure. A budget is
    reset whenever the saved progress of the stage has grown since the previous failure."""

    max_restarts: Annotated[int, Meta(ge=0, le=1000)] = 10
    """Maximum number of restarts after a crash or a stall without new saved progress in between."""
    max_infra_restarts: Annotated[int, Meta(ge=0, le=10000)] = 100
    """Maximum number of restarts after an infrastructure failure (node lost, pod evicted, peer lost) without new saved
    progress in between."""
    in_place_restarts: Annotated[int, Meta(ge=0, le=100)] = 3
    """Maximum number of times that an attempt restarts its training processes without replacing the pods."""
    stall_timeout_seconds: Seconds = 900
    """Seconds without progress after which an attempt counts as stalled and is restarted; 0 disables the detection."""
    start_timeout_seconds: Seconds = 900
    """Seconds within which all pods of an attempt must be running. Otherwise the pods are deleted, which frees their
    resources, and the stage is restarted. Time in a queue does not count."""
    max_failures_per_node: Annotated[int, Meta(ge=0, le=100)] = 3
    """Number of failures of a stage caused by one node after which the node is excluded from running workers of that
    stage; 0 never excludes a node."""


class Gate(Struct, frozen=True, kw_only=True):
    """Bound on a metric of the stage that must hold before later stages start. It may be changed at any time; a run
    that was paused or stopped by the gate continues once the new bound holds."""

    metric: Annotated[str, Meta(min_length=1, max_length=63)]
    """Key of the metric in status.stages[].metrics, for example heldOutLoss or score."""
    at_most: Decimal | UnsetType = UNSET
    """Largest value that passes the gate."""
    at_least: Decimal | UnsetType = UNSET
    """Smallest value that passes the gate."""
    on_fail: Literal["Stop", "Continue", "Pause"] = "Stop"
    """Action if the bound does not hold: Stop fails the run, Continue starts the next stages with the condition
    GatesPassed set to False, Pause waits until the gate is changed."""


class StageSpec(Struct, frozen=True, kw_only=True):
    """One step of the run. Exactly one of curate, pretrain, sft and evaluate sets its kind."""

    name: Name
    """Name of the stage, unique within the run. It is part of the names of its Jobs and of its output directory."""
    depends_on: Annotated[tuple[Name, ...], Meta(max_length=8, extra_json_schema=SET)] | UnsetType = UNSET
    """Names of earlier stages that must succeed before this one starts. Defaults to the preceding stage."""
    init_from: Name | UnsetType = UNSET
    """Name of an earlier pretrain or sft stage whose weights this stage starts from. Defaults to the preceding one."""
    workers: Workers = Workers()
    """Workers of this stage. Fields that are set override those of spec.workers."""
    engine: EngineSpec | UnsetType = UNSET
    """Training engine of this stage. Defaults to spec.engine."""
    curate: Curate | UnsetType = UNSET
    """Builds shards from raw data sets."""
    pretrain: Pretrain | UnsetType = UNSET
    """Pretrains the model on captions."""
    sft: Sft | UnsetType = UNSET
    """Fine-tunes the model on conversations."""
    evaluate: Evaluate | UnsetType = UNSET
    """Scores the model on benchmarks."""
    gate: Gate | UnsetType = UNSET
    """Bound on a metric that must hold before later stages start. Defaults to no bound: later stages start as soon as
    this stage has succeeded."""

    @property
    def kind(self) -> Literal["curate", "pretrain", "sft", "evaluate"]:
        """The kind of the stage, by the field that is set."""
        for kind in ("curate", "pretrain", "sft"):
            if getattr(self, kind) is not UNSET:
                return kind
        return "evaluate"


class Spec(Struct, frozen=True, kw_only=True):
    """Desired state of a SailVLRun: the recipe for one model."""

    suspend: bool = False
    """Whether the run is suspended. Workers of a suspended run save a checkpoint and terminate; a resumed run continues
    from it."""
    image: Annotated[str, Meta(min_length=1, max_length=512, pattern=IMAGE)] | UnsetType = UNSET
    """Container image of the trainer. Defaults to the image that the operator was installed with."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Pull policy of the container image."""
    storage: Storage
    """Volume for data, checkpoints and results, shared by all workers and mounted at /data. It can't change once a
    stage has started."""
    model: Model
    """Model to train. It can't change once a stage has started."""
    workers: Workers = Workers()
    """Workers of every stage. A stage may override single fields."""
    network: Network = Network()
    """Network access to the workers of every stage."""
    engine: EngineSpec = EngineSpec()
    """Training engine of every stage. A stage may override it."""
    restart_policy: RestartPolicy = RestartPolicy()
    """Restart budgets and timeouts of every stage."""
    seed: Annotated[int, Meta(ge=0, le=2_147_483_647)] = 0
    """Seed of the data order, the weight initialization and all other random choices. It can't change once a stage has
    started."""
    active_deadline_seconds: Seconds | UnsetType = UNSET
    """Seconds that the run may be active before it fails. Time while suspended or queued does not count. If the
    deadline of a failed run is raised, the run continues. Defaults to no deadline."""
    ttl_seconds_after_finished: Seconds | UnsetType = UNSET
    """Seconds after which a finished run and its Jobs are deleted. Outputs on the storage are kept unless
    storage.whenDeleted is Delete. Defaults to never."""
    price_per_gpu_hour: Decimal | UnsetType = UNSET
    """Price of one GPU per hour, in any currency, from which status.goodput computes the cost of the run."""
    stages: Annotated[tuple[StageSpec, ...], Meta(min_length=1, max_length=32, extra_json_schema=BY_NAME)]
    """Stages of the run, executed in order unless dependsOn is set. New stages may be appended at any time; stages that
    have started are immutable."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed SailVLRun: the metadata that the reconciler needs, the spec, and the last written status."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: float
    """Creation time in Unix seconds."""
    deleting: bool
    spec: Spec
    status: dict[str, Any]
    restart_stage: str = ""
    """Value of the annotation sailvl.dev/restart-stage; empty if it is not set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Values that the operator was installed with. They hold for every run whose spec does not set its own."""

    image: str = ""
    """Trainer image of runs without `spec.image`."""
    storage: str = names.STORAGE_MOUNT
    """Path at which workers find the run's storage."""
    grace_seconds: int = 120
    """Seconds between SIGTERM and SIGKILL of a worker, in which it saves a checkpoint."""
    failure_settle_seconds: float = 3.0
    """Settling time: seconds between the first sign of a failure and the choice of its cause."""
    backoff_seconds: float = 10.0
    """Seconds before the second attempt after a crash; each further crash doubles them."""
    backoff_limit_seconds: float = 300.0
    """Longest backoff in seconds."""
    network_policies: bool = True
    """Whether runs get a NetworkPolicy, unless their spec disables it."""
    metrics_peers: tuple[dict[str, Any], ...] = ()
    """NetworkPolicyPeers, as in the Kubernetes API, that may connect to the metrics port of workers."""
    progress_seconds: float = 5.0
    """Minimum seconds between two writes of a status in which nothing but progress has changed."""
