"""The shared storage: names of files and directories, and the documents that connect a stage's attempts."""

from __future__ import annotations

from dataclasses import dataclass

from sailvl_trainer.contract.stage_config import SCHEMA_VERSION
from sailvl_trainer.contract.worker import Checkpoint

MANIFEST_FILE = "manifest.json"
"""List of the files of a checkpoint or of a directory of shards; it is written last."""
CONFIG_FILE = "config.json"
"""Copy of the stage config, in the stage's output."""
RESULT_FILE = "result.json"
"""The `Result` of a stage, in the stage's output."""
ATTEMPTS_DIR = "attempts"
"""Directory of `Lineage` and `NonFinite` documents, one of each per attempt at most."""
CHECKPOINTS_DIR = "checkpoints"
"""Directory of checkpoints, with a subdirectory per attempt."""
EXPORT_DIR = "export"
"""Directory of the trained model in Hugging Face's format."""
SHARDS_DIR = "shards"
"""Directory of curated training shards."""
HELD_OUT_DIR = "held-out"
"""Directory of curated shards that are held out from training."""
REPORT_DIR = "report"
"""Directory of a stage's HTML report and its data."""
VERIFIED_DIR = "verified"
"""Directory in a run's directory: records of files of other runs whose hashes were verified, and of reused results."""
RESULTS_DIR = "results"
"""Directory at the root of the storage: <digest>.json names the output that holds the result of a digest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultPointer:
    """Where a result is: that of a digest, in RESULTS_DIR, or the one that an attempt reuses, in VERIFIED_DIR."""

    schema_version: int = SCHEMA_VERSION
    """Version of this document."""
    output: str
    """Output of the stage that computed it, relative to the root of the storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """A range of optimizer steps whose data is skipped because the loss or the gradient norm was not finite there."""

    first: int
    """First skipped step, counted from 1."""
    last: int
    """Last skipped step."""
    step: int
    """Step that failed first."""
    failures: int
    """Number of failures in the range so far; the range grows with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """ATTEMPTS_DIR/<attempt>.non-finite.json: why an attempt ended with NON_FINITE and what the next one skips."""

    schema_version: int = SCHEMA_VERSION
    """Version of this document."""
    attempt: int
    """Number of the attempt that failed."""
    step: int
    """Optimizer step that failed, counted from 1; no checkpoint contains it."""
    quantity: str
    """Name of the value that was not finite: loss or gradient norm."""
    value: str
    """nan, inf or -inf."""
    samples: tuple[int, ...]
    """Samples of the failed step, numbered as in the sample log."""
    max_resume_step: int
    """The next attempt starts from the newest checkpoint whose step is at most this."""
    skips: tuple[Skip, ...]
    """All ranges that the next attempt skips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """ATTEMPTS_DIR/<attempt>.json: the checkpoint that an attempt starts from, and its claim on the stage.

    The file is created exclusively, and empty, before a checkpoint is chosen. Once it exists, older attempts neither
    save nor delete checkpoints nor write the result.
    """

    schema_version: int = SCHEMA_VERSION
    """Version of this document."""
    attempt: int
    """Number of the attempt."""
    start: Checkpoint | None
    """Checkpoint that this attempt starts from; None if it starts from the beginning of the stage."""
    skips: tuple[Skip, ...] = ()
    """Ranges of steps that this attempt skips."""
