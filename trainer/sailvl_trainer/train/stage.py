"""The pretrain and sft stages: from an earlier export or fresh weights to an export, held-out losses in the result."""

from __future__ import annotations

import logging
import math
import time
from functools import partial

import torch.distributed as dist

from sailvl_trainer.contract import Lineage, Result, TrainConfig
from sailvl_trainer.errors import NonFiniteError
from sailvl_trainer.model.export import export_model
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import broadcast_object
from sailvl_trainer.storage.lineage import begin_attempt, check_not_superseded
from sailvl_trainer.train import checkpoint as checkpoints
from sailvl_trainer.train import validation
from sailvl_trainer.train.checkpoint import Position
from sailvl_trainer.train.engines import Engine, build_engine
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.prune import prune
from sailvl_trainer.train.sample_log import count_lost
from sailvl_trainer.train.setup import Prepared, prepare
from sailvl_trainer.train.trainer import Loop

logger = logging.getLogger(__name__)


def run(context: Context) -> Result:
    """Carry the stage out; all ranks call it, the first rank's result counts."""
    started, config = time.time(), context.stage.train
    assert config is not None, "read_stage has checked the kind"
    prepared = prepare(context, config)
    lineage = broadcast_object(begin_attempt(context.files, context.stage.attempt) if context.is_first else None)
    module = PackedModel(prepared.model).to(context.device).train()
    engine = build_engine(module, context.stage.engine, config, device=context.device)
    context.telemetry.update(checkpoint=lineage.start, lost_steps=_count_lost(context, lineage))
    before = _measure(context, module, prepared, config)
    loop = Loop(
        context=context,
        config=config,
        prepared=prepared,
        engine=engine,
        steps=prepared.steps,
        position=_restore(context, prepared, engine, lineage),
        skips=lineage.skips,
    )
    if context.is_first:
        prune(context.files, context.stage.attempt, config.keep_checkpoints)
    loop.run()
    after = _measure(context, module, prepared, config)
    shuffled = _measure(context, module, prepared, config, shuffle=True)
    _export(context, prepared)
    losses = {"heldOutLossBefore": before, "heldOutLoss": after, "heldOutLossShuffled": shuffled}
    losses |= {"loss": loop.position.loss, "skippedSamples": float(loop.position.skipped_samples)}
    return Result(
        stage=context.stage.stage,
        kind=context.stage.kind,
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=loop.steps,
        tokens=loop.position.tokens,
        samples=loop.position.samples,
        lost_steps=context.telemetry.progress.lost_steps,
        seconds=time.time() - started,
        metrics={name: value for name, value in losses.items() if value is not None},
    )


def _count_lost(context: Context, lineage: Lineage) -> int:
    """By the first rank, who has written the ledger."""
    start = 0 if lineage.start is None else lineage.start.step
    return count_lost(context.files, context.stage.attempt, start) if context.is_first else 0


def _measure(
    context: Context, module: PackedModel, prepared: Prepared, config: TrainConfig, *, shuffle: bool = False
) -> float | None:
    """None where the data has no held-out samples. Raises NonFiniteError for a model that is broken."""
    if prepared.held_out is None:
        return None
    context.telemetry.update(phase="evaluating")
    with context.telemetry.activity("evaluating"):
        loss = validation.measure(
            context,
            module,
            prepared.held_out,
            prepared.encoder,
            samples=config.held_out_samples,
            pack_tiles=config.pack_tiles,
            shuffle=shuffle,
        )
    if not math.isfinite(loss):
        raise NonFiniteError(f"the held-out loss is {loss}; look at the model that the stage starts from, and its data")
    return loss


def _restore(context: Context, prepared: Prepared, engine: Engine, lineage: Lineage) -> Position:
    start = lineage.start
    if start is None:
        return Position(data=prepared.planner.start(context.stage.seed))
    folder = context.files.storage / start.path
    manifest = checkpoints.read_manifest(folder, context.stage.digest)
    with context.telemetry.activity("checkpoint"):
        checkpoints.load(folder, manifest, engine.fragments())
        engine.after_load(manifest.position.updates)
    logger.info("going on from %s, step %d; left out: %s", start.path, start.step, lineage.skips or "nothing")
    return manifest.position


def _export(context: Context, prepared: Prepared) -> None:
    """ZeRO-1 keeps whole weights on every rank, so the first one writes them alone."""
    context.telemetry.update(phase="checkpointing")
    if context.is_first:
        check = partial(check_not_superseded, context.files, context.stage.attempt)
        check()
        export_model(prepared.model, prepared.tokenizer, prepared.preset, context.files.export, check=check)
    dist.barrier()
