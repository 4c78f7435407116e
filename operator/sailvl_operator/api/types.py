"""The spec of a SailVLRun, typed; `crd.py` turns these types into the CustomResourceDefinition.

A resource is parsed once, at the edge, into these frozen structs. The docstring under a field is its description in
the schema and in the reference: meaning, unit, default. Kubernetes' API conventions forbid floats, so numbers with
a fraction are decimal strings, and large counts may carry a suffix (131B).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sailvl_operator.api.scalars import (
    BY_NAME,
    NO_SPACE,
    SET,
    Count,
    Decimal,
    Name,
    ObjectName,
    Parts,
    Path,
    Quantity,
    Seconds,
    Server,
    Struct,
    Weights,
)
from sailvl_operator.api.workers import Workers as Workers  # noqa: PLC0414  # part of these types


class VolumeClaimResources(Struct, frozen=True, kw_only=True):
    """As in a PersistentVolumeClaim."""

    requests: Annotated[dict[str, Quantity], Meta(max_length=4)]
    """`storage`: the size."""


class VolumeClaimTemplate(Struct, frozen=True, kw_only=True):
    """The claim that is created for a run: RUN-storage."""

    storage_class_name: ObjectName | UnsetType = UNSET
    """Default: the cluster's default class."""
    access_modes: Annotated[tuple[Literal["ReadWriteMany", "ReadWriteOnce"], ...], Meta(max_length=2)] = (
        "ReadWriteMany",
    )
    """ReadWriteMany whenever a stage has more than one node."""
    resources: VolumeClaimResources
    """The size asked for."""


class Storage(Struct, frozen=True, kw_only=True):
    """Exactly one of volumeClaim and volumeClaimTemplate."""

    volume_claim: ObjectName | UnsetType = UNSET
    """An existing PersistentVolumeClaim in the run's namespace, mounted at /data in every worker."""
    volume_claim_template: VolumeClaimTemplate | UnsetType = UNSET
    """A claim to create for this run."""
    when_deleted: Literal["Retain", "Delete"] = "Retain"
    """Whether the claim of volumeClaimTemplate, and with it every output, stays or goes when the run is deleted. A run
    of the same name takes over a claim that stayed."""


class Model(Struct, frozen=True, kw_only=True):
    """A vision tower, a two-layer connector after a 2x2 pixel shuffle, and a language model."""

    preset: Literal["tiny", "sail-vl-2b", "sail-vl-8b", "sail-vl2-2b"]
    """The architecture."""
    vision: Weights | UnsetType = UNSET
    """Pretrained vision tower: a folder on the storage or a hub id. Default: random weights."""
    language: Weights | UnsetType = UNSET
    """Pretrained language model: a folder on the storage or a hub id. Default: random weights."""


class Engine(Struct, frozen=True, kw_only=True):
    """Of distributed training."""

    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """Which library."""
    zero_stage: Annotated[int, Meta(ge=1, le=3)] = 1
    """DeepSpeed's ZeRO stage."""


class RestartPolicy(Struct, frozen=True, kw_only=True):
    """How many new attempts a stage gets, by the kind of failure. Budgets refill whenever a stage's saved progress has
    grown since the failure before."""

    max_restarts: Annotated[int, Meta(ge=0, le=1000)] = 10
    """After crashes."""
    max_infra_restarts: Annotated[int, Meta(ge=0, le=10000)] = 100
    """After lost nodes, evictions and lost peers."""
    in_place_restarts: Annotated[int, Meta(ge=0, le=100)] = 3
    """Restarts of the processes within an attempt, the pods kept."""
    stall_timeout_seconds: Seconds = 900
    """Without progress for so long an attempt counts as hung; 0: never."""
    start_timeout_seconds: Seconds = 900
    """All pods must run by then, else the attempt makes room and is tried again."""
    max_failures_per_node: Annotated[int, Meta(ge=0, le=100)] = 3
    """A node that took so many attempts of a stage down gets no more of its workers; 0: never."""


class Source(Struct, frozen=True, kw_only=True):
    """A raw data set.

    Formats: imagefolder (pictures with NAME.txt beside them, or captions.jsonl), webdataset (tars),
    procedural (drawn).
    """

    format: Literal["imagefolder", "webdataset", "procedural", "parquet", "jsonl"]
    """How it is stored."""
    path: Path | UnsetType = UNSET
    """On the storage. Not for procedural."""
    name: Annotated[str, Meta(max_length=63)] | UnsetType = UNSET
    """Shown in the report. Default: the last part of the path."""
    samples: Annotated[int, Meta(ge=1, le=1_000_000_000)] | UnsetType = UNSET
    """At most so many. Required for procedural."""
    level: Annotated[int, Meta(ge=1, le=3)] = 1
    """procedural: difficulty."""


class Caption(Struct, frozen=True, kw_only=True):
    """Where captions come from."""

    mode: Literal["keep", "caption", "recaption"] = "keep"
    """keep: the alt-text; caption: from the picture alone; recaption: from picture and alt-text."""
    model: Weights | UnsetType = UNSET
    """A captioner to run in the workers."""
    server: Server | UnsetType = UNSET
    """An OpenAI-compatible server."""


class Judge(Struct, frozen=True, kw_only=True):
    """Drops captions that a judge model scores low on information richness or alignment."""

    model: Weights | UnsetType = UNSET
    """A judge to run in the workers."""
    server: Server | UnsetType = UNSET
    """An OpenAI-compatible server."""
    at_least: Annotated[int, Meta(ge=1, le=5)] = 3
    """Captions below it are dropped."""


class Dedup(Struct, frozen=True, kw_only=True):
    """Duplicates are looked for over all sources."""

    exact: bool = True
    """Drop pictures whose pixels were seen before."""
    perceptual_distance: Annotated[int, Meta(ge=-1, le=16)] = 4
    """Drop pictures within so many bits of 64 of one seen before; -1: keep them."""


class Balance(Struct, frozen=True, kw_only=True):
    """Resampling against over-represented n-grams."""

    ngram: Annotated[int, Meta(ge=1, le=5)] = 2
    """Words a group."""


class Curate(Struct, frozen=True, kw_only=True):
    """Data curation: raw data sets in, verified and deduplicated shards out."""

    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=32)]
    """The raw data sets."""
    caption: Caption = Caption()
    """Where the captions come from."""
    judge: Judge | UnsetType = UNSET
    """Default: nothing is judged."""
    dedup: Dedup = Dedup()
    """Which pictures count as the same."""
    balance: Balance | UnsetType = UNSET
    """Default: nothing is resampled."""
    min_side: Annotated[int, Meta(ge=1, le=4096)] = 28
    """Pixels; smaller pictures are dropped."""
    held_out_fraction: Decimal = "0.02"
    """Part of the samples kept apart for the held-out loss."""
    shard_samples: Annotated[int, Meta(ge=1, le=1_000_000)] = 1024
    """Samples a shard, at most."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 12
    """Tiles a picture, for the token counts of the shards' index."""


class DataInput(Struct, frozen=True, kw_only=True):
    """Exactly one of from and path."""

    from_: Name | UnsetType = msgspec.field(default=UNSET, name="from")
    """A curate stage that comes before."""
    path: Path | UnsetType = UNSET
    """A prepared set of shards on the storage."""


class Training(Struct, frozen=True, kw_only=True):
    """What pretrain and sft share. Exactly one of tokens and epochs."""

    data: Annotated[tuple[DataInput, ...], Meta(min_length=1, max_length=16)]
    """What it learns from: all of it, shuffled together."""
    tokens: Count | UnsetType = UNSET
    """Budget in language-model positions."""
    epochs: Decimal | UnsetType = UNSET
    """Budget in passes over the data."""
    learning_rate: Decimal | UnsetType = UNSET
    """Peak. Default: 2e-4 when the connector learns alone, 2e-5 in other pretraining, 1e-5 in sft."""
    schedule: Literal["cosine", "adalrs"] = "cosine"
    """Of the learning rate after the warm-up."""
    warmup: Decimal = "0.03"
    """Part of the budget."""
    weight_decay: Decimal = "0.05"
    """AdamW's."""
    clip_norm: Decimal = "1.0"
    """The gradient's norm is clipped to it."""
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
    train: Parts = ("connector",)
    """The parts that learn; the others are frozen."""


class Sft(Training, frozen=True, kw_only=True):
    train: Parts = ("vision", "connector", "language")
    """The parts that learn; the others are frozen."""


class CustomBenchmark(Struct, frozen=True, kw_only=True):
    """A benchmark that the table doesn't have."""

    name: Name
    """The key of its score in status.stages[].metrics."""
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
    """How an answer is scored."""
    group: Annotated[str, Meta(min_length=1, max_length=30)] = "Custom"
    """Means are taken by group."""
    max_tiles: Annotated[int, Meta(ge=1, le=40)] = 6
    """Tiles a picture."""


class Evaluate(Struct, frozen=True, kw_only=True):
    """Benchmarks, answered greedily by the model of the training stage before."""

    benchmarks: Annotated[
        tuple[Annotated[str, Meta(max_length=30)], ...], Meta(max_length=32, extra_json_schema=SET)
    ] = ()
    """Names of the table (all: every one), read from DATA/<name>.tsv."""
    data: Path | UnsetType = UNSET
    """Folder of the named benchmarks' TSVs on the storage."""
    custom: Annotated[tuple[CustomBenchmark, ...], Meta(max_length=32, extra_json_schema=BY_NAME)] = ()
    """Benchmarks of your own."""
    limit: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """Questions a benchmark, at most; 0: all."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Length of an answer, at most."""


class Gate(Struct, frozen=True, kw_only=True):
    """The next stages wait until a metric of this one holds. May be changed at any time: a raised gate opens."""

    metric: Annotated[str, Meta(min_length=1, max_length=63)]
    """One of status.stages[].metrics, say heldOutLoss or score."""
    at_most: Decimal | UnsetType = UNSET
    """The largest value that passes."""
    at_least: Decimal | UnsetType = UNSET
    """The smallest value that passes."""
    on_fail: Literal["Stop", "Continue", "Pause"] = "Stop"
    """Stop: the run fails; Continue: go on with a warning; Pause: wait for people."""


class Stage(Struct, frozen=True, kw_only=True):
    """One step of the recipe: exactly one of curate, pretrain, sft, evaluate."""

    name: Name
    """Part of the names of its Jobs and of its directory on the storage."""
    depends_on: Annotated[tuple[Name, ...], Meta(max_length=8, extra_json_schema=SET)] | UnsetType = UNSET
    """Stages before this one that must have succeeded. Default: the one before."""
    init_from: Name | UnsetType = UNSET
    """The training stage whose weights this one starts from. Default: the training stage before."""
    workers: Workers = Workers()
    """Overrides spec.workers, field by field."""
    engine: Engine | UnsetType = UNSET
    """Overrides spec.engine."""
    curate: Curate | UnsetType = UNSET
    """Raw data sets in, shards out."""
    pretrain: Pretrain | UnsetType = UNSET
    """Learn from captions."""
    sft: Sft | UnsetType = UNSET
    """Learn from conversations."""
    evaluate: Evaluate | UnsetType = UNSET
    """Score the model."""
    gate: Gate | UnsetType = UNSET
    """Default: the next stages wait for this one's success alone."""

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
    image: Annotated[str, Meta(min_length=1, max_length=512, pattern=NO_SPACE)] | UnsetType = UNSET
    """The trainer's image. Default: the one the operator was installed with."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes ask the registry for the image."""
    storage: Storage
    """Where data, checkpoints and results are: one volume, shared by all workers, at /data."""
    model: Model
    """What is trained."""
    workers: Workers = Workers()
    """Default for every stage; each stage may override."""
    engine: Engine = Engine()
    """How optimizer states are spread over the GPUs."""
    restart_policy: RestartPolicy = RestartPolicy()
    """How often a stage is tried again."""
    seed: Annotated[int, Meta(ge=0, le=2_147_483_647)] = 0
    """Of data order, initial weights and everything else drawn."""
    active_deadline_seconds: Seconds | UnsetType = UNSET
    """The run fails when it has been active for so long, suspension and queues not counted. Raised, the run goes on."""
    ttl_seconds_after_finished: Seconds | UnsetType = UNSET
    """The run and its children are deleted so long after its end; outputs stay, see storage."""
    price_per_gpu_hour: Decimal | UnsetType = UNSET
    """What a GPU costs an hour, in any currency: status.goodput then tells the cost."""
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=32, extra_json_schema=BY_NAME)]
    """Run in this order, unless dependsOn says otherwise. New ones may be appended to a run at any time."""


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
    restart_stage: str = ""
    """Value of the annotation sailvl.dev/restart-stage."""
