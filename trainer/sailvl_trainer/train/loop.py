"""Optimizer steps from a checkpoint, or the beginning, to the end of the budget; called by the stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sailvl_trainer.contract import Checkpoint, TrainConfig
from sailvl_trainer.data.loader import LoadedStep, load_steps
from sailvl_trainer.loss.forward import arguments
from sailvl_trainer.runtime.context import Context
from sailvl_trainer.runtime.distributed import sum_over_ranks
from sailvl_trainer.runtime.errors import NonFiniteError, Preempted
from sailvl_trainer.train import checkpoint as checkpoints
from sailvl_trainer.train.arithmetic import Arithmetic, build_arithmetic, find_peak
from sailvl_trainer.train.checkpoint import Position
from sailvl_trainer.train.engines import Engine
from sailvl_trainer.train.frozen import require_frozen
from sailvl_trainer.train.ledger import Ledger
from sailvl_trainer.train.meter import Meter
from sailvl_trainer.train.prepare import Prepared
from sailvl_trainer.train.prune import prune
from sailvl_trainer.train.schedule import build_schedule


@dataclass(kw_only=True, slots=True)
class Loop:
    context: Context
    config: TrainConfig
    prepared: Prepared
    engine: Engine
    steps: int
    position: Position
    rate: Callable[[int], float] = field(init=False)
    meter: Meter = field(init=False)
    arithmetic: Arithmetic = field(init=False)
    ledger: Ledger | None = field(init=False)

    def __post_init__(self) -> None:
        context = self.context
        self.rate = build_schedule(self.config, self.steps)
        is_bf16 = self.config.precision == "bf16" and context.device.type != "cpu"
        self.meter = Meter(
            world_size=context.world_size,
            pack_tokens=self.config.pack_tokens,
            peak=find_peak(context.device, is_bf16=is_bf16),
        )
        self.arithmetic = build_arithmetic(self.prepared.model, self.prepared.preset, self.config.train)
        self.ledger = Ledger(context.files, context.stage.attempt) if context.is_first else None

    def run(self) -> None:
        """Train to the end. Raises Preempted, after a checkpoint, when a stop is asked for."""
        context, is_checked = self.context, False
        context.telemetry.update(phase="running", step=self.position.step, steps=self.steps, unit="steps")
        loaded = load_steps(
            self.prepared.planner,
            self.prepared.index,
            self.prepared.encoder,
            self.position.data,
            rank=context.rank,
            world_size=context.world_size,
        )
        while self.position.step < self.steps:
            with self.meter.part("data"), context.telemetry.activity("data_wait"):
                step = next(loaded)
            with context.telemetry.activity("training"):
                self._train(step)
            if not is_checked:
                require_frozen(self.engine, self.prepared.learning)
                is_checked = True
            self._end_step()

    def _train(self, step: LoadedStep) -> None:
        """One optimizer step. The gradient is that of the mean over the labels of all ranks and microsteps."""
        counted = sum_over_ranks(sum(batch.labels for batch in step.batches), self.arithmetic.count(step.batches))
        labels, operations = int(counted[0]), counted[1]
        total = 0.0
        for batch in step.batches:
            with self.meter.part("forward"):
                loss = self.engine.module(**arguments(batch, self.context.device))
                total += float(loss.detach())
            with self.meter.part("backward"):
                self.engine.backward(loss, labels)
        mean = sum_over_ranks(total)[0] / max(1, labels)
        self._require_finite(mean, "loss")
        rate = self.rate(self.position.step)
        with self.meter.part("step"):
            norm = self.engine.step(rate)
        self._require_finite(norm, "gradient norm")
        self._advance(step, mean, operations, {"learning_rate": rate, "gradient_norm": norm})

    def _advance(self, step: LoadedStep, loss: float, operations: float, metrics: dict[str, float]) -> None:
        before = self.position
        self.position = replace(
            before,
            step=before.step + 1,
            tokens=before.tokens + step.tokens,
            samples=before.samples + len(step.samples),
            loss=loss,
            data=step.after,
        )
        if self.ledger is not None:
            self.ledger.write(self.position.step, step.samples)
        measured = self.meter.end_step(
            tokens=step.tokens, microsteps=len(step.batches), operations=operations, now=time.monotonic()
        )
        self.context.telemetry.count_samples("trained", sum(len(batch.samples) for batch in step.batches))
        self.context.telemetry.update(
            step=self.position.step,
            tokens=self.position.tokens,
            samples=self.position.samples,
            eta_seconds=self.meter.seconds_a_step * (self.steps - self.position.step),
            metrics={"loss": loss, "loader_queue": step.ready} | metrics | measured,
        )

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} is {value} at step {self.position.step + 1} of {self.steps}; "
                "look at the data of that step in the ledger, or lower learningRate"
            )

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
        with self.meter.part("checkpoint"), context.telemetry.activity("checkpoint"):
            checkpoints.save(folder, self.engine.fragments(), digest=context.stage.digest, position=position)
        if context.is_first:
            prune(context.files, context.stage.attempt, self.config.keep_checkpoints)
        saved = Checkpoint(step=position.step, path=context.files.relative(folder))
        context.telemetry.update(phase="running", checkpoint=saved)
        return saved
