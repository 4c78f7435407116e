"""The spec of a SailVLRun, typed; `crd.py` turns these types into the CustomResourceDefinition.

A resource is parsed once, at the edge, into these frozen structs. The docstring under a field is its description in
the schema and in the reference: meaning, unit, default. Kubernetes' API conventions forbid floats, so numbers with
a fraction are decimal strings, and large counts may carry a suffix (131B).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Name = Annotated[str, Meta(min_length=1, max_length=30, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
Path = Annotated[str, Meta(min_length=1, max_length=512)]
Count = Annotated[str, Meta(max_length=16, pattern=r"^[0-9]+(\.[0-9]+)?[KMBT]?$")]
"""A large count: 4096, 32K, 1.5M, 131B, 2T."""
Decimal = Annotated[str, Meta(max_length=16, pattern=r"^[0-9]+(\.[0-9]+)?(e-?[0-9]{1,2})?$")]
"""A decimal number as a string: "2e-4", "0.05"."""
Seconds = Annotated[int, Meta(ge=0, le=31_536_000)]


class Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """Base of the spec's structs: camelCase outside, unknown fields refused."""


class VolumeClaimResources(Struct, frozen=True, kw_only=True):
    requests: Annotated[dict[str, Annotated[str, Meta(max_length=32)]], Meta(max_length=4)]


class VolumeClaimTemplate(Struct, frozen=True, kw_only=True):
    storage_class_name: Annotated[str, Meta(max_length=253)] | UnsetType = UNSET
    """Default: the cluster's default class."""
    access_modes: Annotated[tuple[Literal["ReadWriteMany", "ReadWriteOnce"], ...], Meta(max_length=2)] = (
        "ReadWriteMany",
    )
    """ReadWriteMany whenever a stage has more than one node."""
    resources: VolumeClaimResources


class Storage(Struct, frozen=True, kw_only=True):
    """Exactly one of volumeClaim and volumeClaimTemplate."""

    volume_claim: Annotated[str, Meta(min_length=1, max_length=253)] | UnsetType = UNSET
    """An existing PersistentVolumeClaim in the run's namespace, mounted at /data in every worker."""
    volume_claim_template: VolumeClaimTemplate | UnsetType = UNSET
    """A claim to create for this run; it goes with the run."""


class Model(Struct, frozen=True, kw_only=True):
    preset: Literal["tiny", "sail-vl-2b", "sail-vl-8b", "sail-vl2-2b"]
    """The architecture."""
    vision: Path | UnsetType = UNSET
    """Pretrained vision tower: a folder on the storage or a hub id. Default: random weights."""
    language: Path | UnsetType = UNSET
    """Pretrained language model: a folder on the storage or a hub id. Default: random weights."""


class EnvVar(Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    value: Annotated[str, Meta(max_length=1024)] = ""


class SourceRef(Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=253)]
    optional: bool = False


class EnvFrom(Struct, frozen=True, kw_only=True):
    """Exactly one of secretRef and configMapRef."""

    secret_ref: SourceRef | UnsetType = UNSET
    config_map_ref: SourceRef | UnsetType = UNSET


class Toleration(Struct, frozen=True, kw_only=True):
    key: Annotated[str, Meta(max_length=316)] | UnsetType = UNSET
    operator: Literal["Exists", "Equal"] | UnsetType = UNSET
    value: Annotated[str, Meta(max_length=63)] | UnsetType = UNSET
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | UnsetType = UNSET
    toleration_seconds: int | UnsetType = UNSET


Quantity = Annotated[str, Meta(max_length=32)]
Labels = Annotated[dict[str, Annotated[str, Meta(max_length=63)]], Meta(max_length=16)]


class Resources(Struct, frozen=True, kw_only=True):
    requests: Annotated[dict[str, Quantity], Meta(max_length=16)] = {}
    limits: Annotated[dict[str, Quantity], Meta(max_length=16)] = {}


class Workers(Struct, frozen=True, kw_only=True):
    """Where a stage runs. Changed workers take effect at the next attempt; they are no part of a stage's digest."""

    nodes: Annotated[int, Meta(ge=1, le=9999)] | UnsetType = UNSET
    """Pods of the stage, each on a node of its own where there are enough. Default 1."""
    gpus_per_node: Annotated[int, Meta(ge=0, le=64)] | UnsetType = UNSET
    """GPUs a pod; 0: CPU and gloo. Default 8."""
    resources: Resources | UnsetType = UNSET
    """Requests and limits a pod; GPUs are added by gpusPerNode."""
    node_selector: Labels | UnsetType = UNSET
    tolerations: Annotated[tuple[Toleration, ...], Meta(max_length=16)] | UnsetType = UNSET
    priority_class_name: Annotated[str, Meta(max_length=253)] | UnsetType = UNSET
    scheduler_name: Annotated[str, Meta(max_length=253)] | UnsetType = UNSET
    env: Annotated[tuple[EnvVar, ...], Meta(max_length=64)] | UnsetType = UNSET
    env_from: Annotated[tuple[EnvFrom, ...], Meta(max_length=16)] | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET
    """Extra labels of the pods, for pod groups of a gang scheduler and the like."""
    queue_name: Annotated[str, Meta(min_length=1, max_length=63)] | UnsetType = UNSET
    """Kueue's local queue; the Job's suspend is then Kueue's."""


class Engine(Struct, frozen=True, kw_only=True):
    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    zero_stage: Annotated[int, Meta(ge=1, le=3)] = 1
    """DeepSpeed's ZeRO stage."""


class RestartPolicy(Struct, frozen=True, kw_only=True):
    """How many new attempts a stage gets, by the kind of failure."""

    max_restarts: Annotated[int, Meta(ge=0, le=1000)] = 10
    """After crashes."""
    max_infra_restarts: Annotated[int, Meta(ge=0, le=10000)] = 100
    """After lost nodes, evictions and lost peers."""
    in_place_restarts: Annotated[int, Meta(ge=0, le=100)] = 3
    """Restarts of the processes within an attempt, the pods kept."""
    stall_seconds: Seconds = 900
    """Without progress for so long an attempt counts as hung; 0: never."""
    start_timeout_seconds: Seconds = 900
    """All pods must run by then, else the attempt makes room and is tried again."""


class Source(Struct, frozen=True, kw_only=True):
    """A raw data set.

    Formats: imagefolder (pictures with NAME.txt beside them, or captions.jsonl), webdataset (tars),
    procedural (drawn).
    """

    format: Literal["imagefolder", "webdataset", "procedural", "parquet", "jsonl"]
    path: Path | UnsetType = UNSET
    """On the storage. Not for procedural."""
    name: Annotated[str, Meta(max_length=63)] | UnsetType = UNSET
    """Shown in the report. Default: the last part of the path."""
    samples: Annotated[int, Meta(ge=1, le=1_000_000_000)] | UnsetType = UNSET
    """At most so many. Required for procedural."""
    level: Annotated[int, Meta(ge=1, le=3)] = 1
    """procedural: difficulty."""


class Caption(Struct, frozen=True, kw_only=True):
    mode: Literal["keep", "caption", "recaption"] = "keep"
    """keep: the alt-text; caption: from the picture alone; recaption: from picture and alt-text."""
    model: Path | UnsetType = UNSET
    """A captioner to run in the workers."""
    server: Annotated[str, Meta(max_length=512, pattern=r"^https?://")] | UnsetType = UNSET
    """An OpenAI-compatible server."""


class Judge(Struct, frozen=True, kw_only=True):
    """Drops captions that a judge model scores low on information richness or alignment."""

    model: Path | UnsetType = UNSET
    server: Annotated[str, Meta(max_length=512, pattern=r"^https?://")] | UnsetType = UNSET
    at_least: Annotated[int, Meta(ge=1, le=5)] = 3


class Dedup(Struct, frozen=True, kw_only=True):
    exact: bool = True
    """Drop pictures whose pixels were seen before."""
    perceptual_distance: Annotated[int, Meta(ge=-1, le=16)] = 4
    """Drop pictures within so many bits of 64 of one seen before; -1: keep them."""


class Balance(Struct, frozen=True, kw_only=True):
    """Resampling against over-represented n-grams."""

    ngram: Annotated[int, Meta(ge=1, le=5)] = 2


class Curate(Struct, frozen=True, kw_only=True):
    """Data curation: raw data sets in, verified and deduplicated shards out."""

    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=32)]
    caption: Caption = Caption()
    judge: Judge | UnsetType = UNSET
    dedup: Dedup = Dedup()
    balance: Balance | UnsetType = UNSET
    min_side: Annotated[int, Meta(ge=1, le=4096)] = 28
    """Pixels; smaller pictures are dropped."""
    held_out: Decimal = "0.02"
    """Part of the samples kept apart for the held-out loss."""
    shard_samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    """Samples a shard, at most."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 12


class DataInput(Struct, frozen=True, kw_only=True):
    """Exactly one of from and path."""

    from_: Name | UnsetType = msgspec.field(default=UNSET, name="from")
    """A curate stage that comes before."""
    path: Path | UnsetType = UNSET
    """A prepared set of shards on the storage."""


class Training(Struct, frozen=True, kw_only=True):
    """What pretrain and sft share. Exactly one of tokens and epochs."""

    data: Annotated[tuple[DataInput, ...], Meta(min_length=1, max_length=16)]
    tokens: Count | UnsetType = UNSET
    """Budget in language-model positions."""
    epochs: Decimal | UnsetType = UNSET
    """Budget in passes over the data."""
    learning_rate: Decimal | UnsetType = UNSET
    """Peak. Default: 2e-4 when the connector learns alone, 2e-5 in other pretraining, 1e-5 in sft."""
    schedule: Literal["cosine", "adalrs"] = "cosine"
    warmup: Decimal = "0.03"
    """Part of the budget."""
    weight_decay: Decimal = "0.05"
    clip_norm: Decimal = "1.0"
    batch_tokens: Count | UnsetType = UNSET
    """Tokens an optimizer step over all workers. Default: 4M when the connector learns alone, else 1M; tiny: 4096."""
    pack_tokens: Count | UnsetType = UNSET
    """Length of a packed sequence. Default: 16384; tiny: 1024."""
    pack_tiles: Annotated[int, Meta(ge=1, le=1024)] = 48
    """Tiles a packed sequence."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 12
    """Tiles a picture."""
    precision: Literal["bf16", "fp32"] | UnsetType = UNSET
    """Default: bf16 on GPUs, fp32 on the CPU."""
    checkpoint_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 500
    """Optimizer steps between checkpoints."""
    held_out_samples: Annotated[int, Meta(ge=0, le=1_000_000)] = 256
    """Samples for the held-out loss."""


class Pretrain(Training, frozen=True, kw_only=True):
    train: Annotated[tuple[Literal["vision", "connector", "language"], ...], Meta(min_length=1, max_length=3)] = (
        "connector",
    )
    """The parts that learn; the others are frozen."""


class Sft(Training, frozen=True, kw_only=True):
    train: Annotated[tuple[Literal["vision", "connector", "language"], ...], Meta(min_length=1, max_length=3)] = (
        "vision",
        "connector",
        "language",
    )
    """The parts that learn; the others are frozen."""


class CustomBenchmark(Struct, frozen=True, kw_only=True):
    name: Name
    path: Path
    """A VLMEvalKit-style TSV on the storage; for caption_loss a directory of shards."""
    metric: Literal[
        "exact_match",
        "multiple_choice",
        "vqa_accuracy",
        "relaxed_accuracy",
        "anls",
        "yes_no_f1",
        "caption_loss",
    ]
    group: Annotated[str, Meta(min_length=1, max_length=30)] = "Custom"
    """Means are taken by group."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 6


class Evaluate(Struct, frozen=True, kw_only=True):
    """Benchmarks, answered greedily by the model of the training stage before."""

    benchmarks: Annotated[tuple[Annotated[str, Meta(max_length=30)], ...], Meta(max_length=32)] = ()
    """Names of the table (all: every one), read from DATA/<name>.tsv."""
    data: Path | UnsetType = UNSET
    """Folder of the named benchmarks' TSVs on the storage."""
    custom: Annotated[tuple[CustomBenchmark, ...], Meta(max_length=32)] = ()
    limit: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Questions a benchmark, at most; 0: all."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64


class Gate(Struct, frozen=True, kw_only=True):
    """The next stages wait until a metric of this one holds."""

    metric: Annotated[str, Meta(min_length=1, max_length=63)]
    at_most: Decimal | UnsetType = UNSET
    at_least: Decimal | UnsetType = UNSET
    on_fail: Literal["Stop", "Continue", "Pause"] = "Stop"


class Stage(Struct, frozen=True, kw_only=True):
    """One step of the recipe: exactly one of curate, pretrain, sft, evaluate."""

    name: Name
    depends_on: Annotated[tuple[Name, ...], Meta(max_length=8)] | UnsetType = UNSET
    """Stages before this one that must have succeeded. Default: the one before."""
    init_from: Name | UnsetType = UNSET
    """The training stage whose weights this one starts from. Default: the training stage before."""
    workers: Workers = Workers()
    """Overrides spec.workers, field by field."""
    engine: Engine | UnsetType = UNSET
    """Overrides spec.engine."""
    curate: Curate | UnsetType = UNSET
    pretrain: Pretrain | UnsetType = UNSET
    sft: Sft | UnsetType = UNSET
    evaluate: Evaluate | UnsetType = UNSET
    gate: Gate | UnsetType = UNSET

    @property
    def kind(self) -> Literal["curate", "pretrain", "sft", "evaluate"]:
        """Which of the four it is."""
        for kind in ("curate", "pretrain", "sft"):
            if getattr(self, kind) is not UNSET:
                return kind
        return "evaluate"


class Spec(Struct, frozen=True, kw_only=True):
    """The whole recipe for one model."""

    suspend: bool = False
    """true: save a checkpoint and give the GPUs back; false: go on."""
    image: Annotated[str, Meta(min_length=1, max_length=512)] | UnsetType = UNSET
    """The trainer's image. Default: the one the operator was installed with."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    storage: Storage
    model: Model
    workers: Workers = Workers()
    """Default for every stage; each stage may override."""
    engine: Engine = Engine()
    restart_policy: RestartPolicy = RestartPolicy()
    seed: Annotated[int, Meta(ge=0, le=2_147_483_647)] = 0
    """Of data order, initial weights and everything else drawn."""
    active_deadline_seconds: Seconds | UnsetType = UNSET
    """The run fails when it has been active for so long."""
    ttl_seconds_after_finished: Seconds | UnsetType = UNSET
    """The run and its children are deleted so long after its end."""
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=32)]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One SailVLRun, parsed: what reconciling needs of metadata, the spec, and the status as last written."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: float
    """Unix seconds."""
    deleting: bool
    spec: Spec
    status: dict[str, Any]
