"""The curate stage: from raw sources to shards, a held-out set and a report. Called by rank/main.py on every rank.

Every step leaves its output below <output>/artifacts, so that a later attempt continues where this one was interrupted.
The shards are the same bytes for any number of ranks.
"""

from __future__ import annotations

import time

from sailvl_trainer.contract import CurateConfig, Result
from sailvl_trainer.curate import pipeline
from sailvl_trainer.curate.artifacts import CurationArtifacts
from sailvl_trainer.curate.report import write_report
from sailvl_trainer.curate.selection import select_samples
from sailvl_trainer.curate.statistics import Statistics, read_statistics
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import TaskPool


def run(context: Context) -> Result:
    """Run the stage. COLLECTIVE. Raises ConfigError if a source doesn't exist or if every image was dropped."""
    started, config = time.time(), context.stage.curate
    assert config is not None, "read_stage has checked the kind"
    pool, artifacts = TaskPool(context), CurationArtifacts(context.files.output / "artifacts")
    context.telemetry.update(phase="running", unit="samples", step=0)

    # 1. Divide the sources into partitions: image folders, tars, synthetic sets.
    pool.run_on_first_rank("listing", lambda: pipeline.list_partitions(context, artifacts, config))
    # 2. List the items of each partition without decoding them.
    pipeline.list_items(context, pool, artifacts)
    # 3. Decode, measure and hash every item, or record why it is dropped.
    pipeline.verify_items(context, pool, artifacts, config)
    # 4. Drop duplicates, choose the held-out samples, and assign the rest to shards.
    pool.run_on_first_rank("deciding", lambda: _select_samples(context, artifacts, config))
    # 5. Write the shards.
    pipeline.write_shards(context, pool, artifacts)
    # 6. Publish the shards in their manifests, and report.
    pool.run_on_first_rank("reporting", lambda: _publish(context, artifacts, config))
    return _build_result(context, read_statistics(context.files.report), time.time() - started)


def _select_samples(context: Context, artifacts: CurationArtifacts, config: CurateConfig) -> None:
    if artifacts.shards.exists():
        return
    for outcome, count in sorted(select_samples(artifacts, config).items()):
        context.telemetry.count_samples(outcome, count)


def _publish(context: Context, artifacts: CurationArtifacts, config: CurateConfig) -> None:
    pipeline.write_manifests(context, artifacts)
    write_report(artifacts, context.files.report, config)


def _build_result(context: Context, statistics: Statistics, seconds: float) -> Result:
    return Result(
        stage=context.stage.stage,
        kind="curate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=statistics.items,
        samples=statistics.kept_count,
        seconds=seconds,
        metrics=statistics.metrics,
    )
