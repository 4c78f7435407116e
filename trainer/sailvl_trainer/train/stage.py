"""The pretrain and sft stages: from an earlier export or fresh weights to an export, held-out losses in the result."""

from __future__ import annotations

import time

import torch.distributed as dist

from sailvl_trainer.contract import Checkpoint, Result, TrainConfig
from sailvl_trainer.model.export import export_model
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import broadcast
from sailvl_trainer.train import checkpoint as checkpoints
from sailvl_trainer.train import held_out
from sailvl_trainer.train.engines.deepspeed import DeepSpeedEngine
from sailvl_trainer.train.forward import PackedModel
from sailvl_trainer.train.loop import Loop, Position
from sailvl_trainer.train.prepare import Prepared, count_steps, prepare


def run(context: Context) -> Result:
    """Carry the stage out; all ranks call it, the first rank's result counts."""
    started, config = time.time(), context.stage.train
    assert config is not None, "read_stage has checked the kind"
    prepared = prepare(context, config)
    module = PackedModel(prepared.model).to(context.device)
    start = broadcast([context.files.begin_attempt(context.stage.attempt)] if context.is_first else None)[0]
    before = _measure(context, module, prepared, config)
    engine = DeepSpeedEngine(module, context.stage.engine, config, world_size=context.world_size)
    require_frozen(module, config)
    loop = Loop(
        context=context,
        config=config,
        prepared=prepared,
        engine=engine,
        steps=count_steps(config, prepared.planner, context.stage.seed),
        position=_restore(context, prepared, engine, start),
    )
    loop.run()
    after = _measure(context, module, prepared, config)
    shuffled = _measure(context, module, prepared, config, shuffle=True)
    _export(context, prepared)
    return Result(
        stage=context.stage.stage,
        kind=context.stage.kind,
        digest=context.stage.digest,
        attempt=context.stage.attempt,
        output=context.files.relative(context.files.output),
        steps=loop.steps,
        tokens=loop.position.tokens,
        samples=loop.position.samples,
        seconds=time.time() - started,
        metrics={
            "loss": loop.loss,
            "heldOutLossBefore": before,
            "heldOutLoss": after,
            "heldOutLossShuffled": shuffled,
        },
    )


def require_frozen(module: PackedModel, config: TrainConfig) -> None:
    """What is frozen has no gradient and no place in the optimizer."""
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == hasattr(parameter, "_hp_mapping"), f"{name} with train={config.train}"


def _measure(
    context: Context, module: PackedModel, prepared: Prepared, config: TrainConfig, *, shuffle: bool = False
) -> float:
    context.telemetry.update(phase="evaluating")
    with context.telemetry.activity("evaluating"):
        return held_out.measure(
            context,
            module,
            prepared.held_out,
            prepared.encoder,
            samples=config.held_out_samples,
            pack_tiles=config.pack_tiles,
            shuffle=shuffle,
        )


def _restore(context: Context, prepared: Prepared, engine: DeepSpeedEngine, start: Checkpoint | None) -> Position:
    if start is None:
        return Position(step=0, tokens=0, samples=0, data=prepared.planner.start(context.stage.seed))
    folder = context.files.storage / start.path
    manifest = checkpoints.read_manifest(folder)
    checkpoints.load(folder, manifest, engine.fragments())
    engine.after_load(manifest.step)
    return Position(step=manifest.step, tokens=manifest.tokens, samples=manifest.samples, data=manifest.data)


def _export(context: Context, prepared: Prepared) -> None:
    """ZeRO-1 keeps whole weights on every rank, so the first one writes them alone."""
    if context.is_first:
        export_model(prepared.model, prepared.tokenizer, prepared.preset, context.files.export)
    dist.barrier()
