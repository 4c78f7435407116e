"""The curate stage: list and verify in parallel, decide once, write shards in parallel, report once.

Called by rank.py on every rank. Every pass leaves its output under <output>/parts, so a run that is killed or stopped
goes on where it was; the shards are the same bytes whatever the number of ranks.
"""

from __future__ import annotations

import time

from sailvl_trainer.contract import CurateConfig, Result
from sailvl_trainer.curate import pipeline
from sailvl_trainer.curate.artifacts import Parts
from sailvl_trainer.curate.ingest import list_containers
from sailvl_trainer.curate.report import write_report
from sailvl_trainer.curate.selection import decide
from sailvl_trainer.curate.statistics import Statistics, read_statistics
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed_tasks import Crew
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode


def run(context: Context) -> Result:
    """Carry the stage out. COLLECTIVE. Raises ConfigError for sources that aren't there or of which nothing is kept."""
    started, config = time.time(), context.stage.curate
    assert config is not None, "read_stage has checked the kind"
    crew, parts = Crew(context), Parts(context.files.output / "parts")
    context.telemetry.update(phase="running", unit="samples", step=0)
    with crew.first_alone("listing") as is_mine:
        if is_mine and not parts.containers.exists():
            write_atomic(parts.containers, encode(list_containers(config.sources, context.stage.seed)))
    pipeline.list_all(context, crew, parts)
    pipeline.verify_all(context, crew, parts, config)
    with crew.first_alone("deciding") as is_mine:
        if is_mine and not parts.shards.exists():
            _decide(context, parts, config)
    pipeline.write_all(context, crew, parts)
    with crew.first_alone("reporting") as is_mine:
        if is_mine:
            pipeline.write_manifests(context, parts)
            write_report(parts, context.files.report, config)
    return _build_result(context, read_statistics(context.files.report), time.time() - started)


def _decide(context: Context, parts: Parts, config: CurateConfig) -> None:
    for outcome, number in sorted(decide(parts, config).items()):
        context.telemetry.count_samples(outcome, number)


def _build_result(context: Context, statistics: Statistics, seconds: float) -> Result:
    return Result(
        stage=context.stage.stage,
        kind="curate",
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=statistics.items,
        samples=statistics.kept,
        seconds=seconds,
        metrics=statistics.metrics,
    )
