"""The contract between the operator and the trainer; it uses the standard library only, and both import it.

The operator writes a `Stage` (the stage config) for every attempt. Each worker serves `Progress` while it runs and
leaves a `Termination`, with the `Result` of a stage that succeeded, when it exits. All documents are JSON objects with
the field names below; fields without a default are required.
"""

from __future__ import annotations

from sailvl_trainer.contract.stage_config import (
    RECIPE_VERSION,
    SCHEMA_VERSION,
    BenchmarkConfig,
    CurateConfig,
    EngineConfig,
    EvaluateConfig,
    Kind,
    Metric,
    ModelConfig,
    Part,
    SourceConfig,
    Stage,
    TrainConfig,
)
from sailvl_trainer.contract.storage import (
    ATTEMPTS_DIR,
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    EXPORT_DIR,
    HELD_OUT_DIR,
    MANIFEST_FILE,
    REPORT_DIR,
    RESULT_FILE,
    RESULTS_DIR,
    SHARDS_DIR,
    Lineage,
    NonFinite,
    Skip,
)
from sailvl_trainer.contract.worker import (
    METRICS_PORT,
    NON_RETRYABLE_EXIT_CODES,
    RENDEZVOUS_PORT,
    TERMINATION_MESSAGE_BYTES,
    WATCHDOG_INTERVAL_SECONDS,
    Checkpoint,
    Env,
    ExitCode,
    Phase,
    Progress,
    Result,
    Termination,
)

__all__ = [
    "ATTEMPTS_DIR",
    "CHECKPOINTS_DIR",
    "CONFIG_FILE",
    "EXPORT_DIR",
    "HELD_OUT_DIR",
    "MANIFEST_FILE",
    "METRICS_PORT",
    "NON_RETRYABLE_EXIT_CODES",
    "RECIPE_VERSION",
    "RENDEZVOUS_PORT",
    "REPORT_DIR",
    "RESULTS_DIR",
    "RESULT_FILE",
    "SCHEMA_VERSION",
    "SHARDS_DIR",
    "TERMINATION_MESSAGE_BYTES",
    "WATCHDOG_INTERVAL_SECONDS",
    "BenchmarkConfig",
    "Checkpoint",
    "CurateConfig",
    "EngineConfig",
    "Env",
    "EvaluateConfig",
    "ExitCode",
    "Kind",
    "Lineage",
    "Metric",
    "ModelConfig",
    "NonFinite",
    "Part",
    "Phase",
    "Progress",
    "Result",
    "Skip",
    "SourceConfig",
    "Stage",
    "Termination",
    "TrainConfig",
]
