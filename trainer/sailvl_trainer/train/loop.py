"""Optimizer steps from a checkpoint, or the beginning, to the end of the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sailvl_trainer.contract import Checkpoint, TrainConfig
from sailvl_trainer.data.loader import LoadedStep, load_steps
from sailvl_trainer.data.planner import PlanState
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import sum_over_ranks
from sailvl_trainer.runtime.errors import NonFiniteError, Preempted
from sailvl_trainer.train import checkpoint as checkpoints
from sailvl_trainer.train.engines.deepspeed import DeepSpeedEngine
from sailvl_trainer.train.forward import arguments
from sailvl_trainer.train.ledger import Ledger
from sailvl_trainer.train.prepare import Prepared
from sailvl_trainer.train.schedule import build_schedule


@dataclass(kw_only=True, slots=True)
class Position:
    """How far the stage is; all of it is in a checkpoint."""

    step: int
    tokens: int
    samples: int
    data: PlanState


@dataclass(kw_only=True, slots=True)
class Loop:
    context: Context
    config: TrainConfig
    prepared: Prepared
    engine: DeepSpeedEngine
    steps: int
    position: Position
    rate: Callable[[int], float] = field(init=False)
    ledger: Ledger | None = field(init=False)
    loss: float = math.nan

    def __post_init__(self) -> None:
        self.rate = build_schedule(self.config, self.steps)
        first = self.context.is_first
        self.ledger = Ledger(self.context.files, self.context.stage.attempt) if first else None

    def run(self) -> None:
        """Train to the end. Raises Preempted, after a checkpoint, when a stop is asked for."""
        telemetry = self.context.telemetry
        telemetry.update(phase="running", step=self.position.step, steps=self.steps, unit="steps")
        loaded = load_steps(
            self.prepared.planner,
            self.prepared.index,
            self.prepared.encoder,
            self.position.data,
            rank=self.context.rank,
            world_size=self.context.world_size,
        )
        while self.position.step < self.steps:
            with telemetry.activity("data_wait"):
                step = next(loaded)
            with telemetry.activity("training"):
                self._train(step)
            self._end_step()

    def _train(self, step: LoadedStep) -> None:
        start = time.monotonic()
        (labels,) = sum_over_ranks(sum(batch.labels for batch in step.batches))
        total = 0.0
        for batch in step.batches:
            loss = self.engine.module(**arguments(batch, self.context.device))
            total += float(loss.detach())
            self.engine.backward(loss, int(labels))
        self.loss = sum_over_ranks(total)[0] / max(1.0, labels)
        self._require_finite(self.loss, "loss")
        rate = self.rate(self.position.step)
        norm = self.engine.step(rate)
        self._require_finite(norm, "gradient norm")
        self._advance(step, rate, norm, time.monotonic() - start)

    def _advance(self, step: LoadedStep, rate: float, norm: float, seconds: float) -> None:
        position = self.position
        position.step += 1
        position.tokens += step.tokens
        position.samples += len(step.samples)
        position.data = step.after
        if self.ledger is not None:
            self.ledger.write(position.step, step.samples)
        capacity = self.config.pack_tokens * max(1, len(step.batches) * self.context.world_size)
        self.context.telemetry.update(
            step=position.step,
            tokens=position.tokens,
            samples=position.samples,
            eta_seconds=seconds * (self.steps - position.step),
            metrics={
                "loss": self.loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_second": step.tokens / seconds,
                "pack_fill": step.tokens / capacity,
            },
        )

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(f"the {what} is {value} at step {self.position.step + 1}; lower learningRate")

    def _end_step(self) -> None:
        is_due = self.position.step % self.config.checkpoint_steps == 0 and self.position.step < self.steps
        is_asked = self.context.preemption.requested()
        if is_due or is_asked:
            saved = self.save()
            if is_asked:
                raise Preempted(f"stopped on request at step {saved.step} of {self.steps}", checkpoint=saved)

    def save(self) -> Checkpoint:
        """A checkpoint of the position; the older ones are pruned."""
        context, position = self.context, self.position
        folder = context.files.checkpoint_dir(context.stage.attempt, position.step)
        context.telemetry.update(phase="checkpointing")
        with context.telemetry.activity("checkpoint"):
            checkpoints.save(
                folder,
                self.engine.fragments(),
                step=position.step,
                tokens=position.tokens,
                samples=position.samples,
                data=position.data,
            )
        saved = Checkpoint(step=position.step, path=context.files.relative(folder))
        if context.is_first:
            checkpoints.prune(context.files, context.stage.attempt, self.config.keep_checkpoints, saved)
        context.telemetry.update(phase="running", checkpoint=saved)
        return saved
