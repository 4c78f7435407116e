"""The pretrain and sft stages: train from fresh weights or an earlier stage's export, and export the result.

The validation loss is measured before and after training, and once more with shuffled images.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial

import torch.distributed as dist

from sailvl_trainer.contract import Lineage, Result, TrainConfig
from sailvl_trainer.data.image_memory import limit_image_memory
from sailvl_trainer.errors import NonFiniteError
from sailvl_trainer.model.export import export_model
from sailvl_trainer.rank.collectives import broadcast_value
from sailvl_trainer.rank.context import Context
from sailvl_trainer.storage.lineage import begin_attempt, check_not_superseded
from sailvl_trainer.train import validation
from sailvl_trainer.train.checkpoint import delete_old_checkpoints, load_checkpoint
from sailvl_trainer.train.checkpoint_manifest import (
    DamagedCheckpointError,
    TrainingState,
    discard_checkpoint,
    is_usable_checkpoint,
)
from sailvl_trainer.train.engine import Engine, build_engine
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.sample_log import count_lost_steps
from sailvl_trainer.train.setup import TrainingSetup, prepare
from sailvl_trainer.train.trainer import Trainer

logger = logging.getLogger(__name__)


def run(context: Context) -> Result:
    """Run the stage and return its result, of which the first rank's counts. COLLECTIVE."""
    started, config = time.monotonic(), context.stage.train
    assert config is not None, "read_stage has checked the kind"
    limit_image_memory(context.memory_bytes)
    # 1. Build what every rank needs, and find the checkpoint to resume from.
    setup = prepare(context, config)
    lineage = _begin_attempt(context)
    model = PackedModel(setup.model).to(context.device).train()
    engine = build_engine(model, context.stage.engine, config, device=context.device)
    context.telemetry.update(checkpoint=lineage.start, lost_steps=_count_lost_steps(context, lineage))
    # 2. Measure the initial weights, before a checkpoint replaces them.
    loss_before = _measure_validation_loss(context, model, setup, config)
    # 3. Resume and train to the end of the budget.
    state, lineage = _load_state(context, setup, engine, lineage)
    trainer = Trainer(context=context, config=config, setup=setup, engine=engine, state=state, skips=lineage.skips)
    if context.is_first:
        delete_old_checkpoints(context.files, context.stage.attempt, config.keep_checkpoints)
    trainer.run()
    # 4. Measure the trained weights and export them.
    loss_after = _measure_validation_loss(context, model, setup, config)
    loss_shuffled = _measure_validation_loss(context, model, setup, config, shuffle_images=True)
    _export(context, setup)
    metrics = {"heldOutLossBefore": loss_before, "heldOutLoss": loss_after, "heldOutLossShuffled": loss_shuffled}
    return _build_result(context, trainer, metrics, time.monotonic() - started)


def _build_result(context: Context, trainer: Trainer, metrics: dict[str, float | None], seconds: float) -> Result:
    """Return the stage's result; metrics that are None are left out."""
    state = trainer.state
    metrics |= {"loss": state.loss, "skippedSamples": float(state.skipped_samples)}
    return Result(
        stage=context.stage.stage,
        kind=context.stage.kind,
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative_path(context.files.output),
        steps=trainer.steps,
        tokens=state.tokens,
        samples=state.samples,
        lost_steps=context.telemetry.progress.lost_steps,
        seconds=seconds,
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def _count_lost_steps(context: Context, lineage: Lineage) -> int:
    """Return the steps that earlier attempts did after the checkpoint to resume from; 0 on all ranks but the first."""
    start = 0 if lineage.start is None else lineage.start.step
    return count_lost_steps(context.files, context.stage.attempt, start) if context.is_first else 0


def _measure_validation_loss(
    context: Context, model: PackedModel, setup: TrainingSetup, config: TrainConfig, *, shuffle_images: bool = False
) -> float | None:
    """Return the validation loss; None if no sample is held out or measured. Raises NonFiniteError for a NaN."""
    if setup.validation_set is None or not config.held_out_samples:
        return None
    context.telemetry.update(phase="evaluating")
    with context.telemetry.activity("evaluating"):
        loss = validation.measure_validation_loss(
            context,
            model,
            setup.validation_set,
            setup.encoder,
            samples=config.held_out_samples,
            pack_tiles=config.pack_tiles,
            shuffle_images=shuffle_images,
        )
    if loss is not None and not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss is {loss}; check the model that the stage starts from, and its held-out data"
        )
    return loss


def _begin_attempt(context: Context) -> Lineage:
    """Choose the checkpoint to resume from on the first rank, and return the lineage on every rank. COLLECTIVE."""
    if not context.is_first:
        return broadcast_value(Lineage, None)
    is_usable = partial(is_usable_checkpoint, context.files, context.stage.digest)
    return broadcast_value(Lineage, begin_attempt(context.files, context.stage.attempt, is_usable=is_usable))


def _load_state(
    context: Context, setup: TrainingSetup, engine: Engine, lineage: Lineage
) -> tuple[TrainingState, Lineage]:
    """Load the checkpoint that the attempt starts from into the engine; without one, return the initial state.

    A damaged checkpoint is set aside, and an earlier one is chosen; the lineage that is returned names it. COLLECTIVE.
    """
    while lineage.start is not None:
        folder = context.files.storage / lineage.start.path
        try:
            with context.telemetry.activity("checkpoint"):
                state = load_checkpoint(folder, context.stage.digest, list(engine.fragments()))
                engine.sync_after_load(state.updates)
        except DamagedCheckpointError as error:
            if context.is_first:
                discard_checkpoint(folder, error)
            lineage = _begin_attempt(context)
            context.telemetry.update(checkpoint=lineage.start, lost_steps=_count_lost_steps(context, lineage))
            continue
        skipped = lineage.skips or "none"
        logger.info("resuming from %s at step %d; skipped step ranges: %s", folder, state.step, skipped)
        return state, lineage
    return TrainingState(data=setup.planner.first_position(context.stage.seed)), lineage


def _export(context: Context, setup: TrainingSetup) -> None:
    """Write the model as a Hugging Face folder by the first rank alone: ZeRO-1 keeps whole weights on every rank."""
    context.telemetry.update(phase="checkpointing")
    if context.is_first:
        check = partial(check_not_superseded, context.files, context.stage.attempt)
        check()
        export_model(setup.model, setup.tokenizer, setup.preset, context.files.export, check=check)
    dist.barrier()
