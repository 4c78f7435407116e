"""Optimizer steps from a checkpoint, or the beginning, to the end of the budget; called by the stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from sailvl_trainer.contract import Checkpoint, NonFinite, Skip, TrainConfig
from sailvl_trainer.data.loader import LoadedStep, load_steps
from sailvl_trainer.errors import NonFiniteError, Preempted
from sailvl_trainer.rank.context import Context
from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.lineage import check_not_superseded, non_finite_path
from sailvl_trainer.train import checkpoint as checkpoints
from sailvl_trainer.train.checkpoint import Position
from sailvl_trainer.train.engines import Engine
from sailvl_trainer.train.flops import Arithmetic, build_arithmetic, find_peak
from sailvl_trainer.train.forward import arguments
from sailvl_trainer.train.frozen import require_frozen
from sailvl_trainer.train.prune import prune
from sailvl_trainer.train.sample_log import Ledger
from sailvl_trainer.train.schedule import build_schedule
from sailvl_trainer.train.setup import Prepared
from sailvl_trainer.train.skip_policy import widen
from sailvl_trainer.train.throughput import Meter


@dataclass(kw_only=True, slots=True)
class Loop:
    context: Context
    config: TrainConfig
    prepared: Prepared
    engine: Engine
    steps: int
    position: Position
    skips: tuple[Skip, ...] = ()
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
        """Train to the end, and save there: what comes after it may fail, and need not cost a step.

        Raises Preempted, after a checkpoint, when a stop is asked for.
        """
        context, is_checked = self.context, False
        context.telemetry.update(phase="running", step=self.position.step, steps=self.steps, unit="steps")
        loaded = load_steps(
            self.prepared.planner,
            self.prepared.index,
            self.prepared.encoder,
            self.position.data,
            rank=context.rank,
            world_size=context.world_size,
            done=self.position.step,
            skips=self.skips,
        )
        while self.position.step < self.steps:
            with self.meter.part("data"), context.telemetry.activity("dataWait"):
                step = next(loaded)
            if step.is_skipped:
                self._skip(step)
            else:
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
        self._require_finite(mean, "loss", step)
        rate = self.rate(self.position.step)
        with self.meter.part("step"):
            norm = self.engine.step(rate)
        self._require_finite(norm, "gradient norm", step)
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

    def _skip(self, step: LoadedStep) -> None:
        """The step counts as done, with no update; its samples are in the ledger as left out."""
        before, number = self.position, len(step.samples)
        self.position = replace(
            before,
            step=before.step + 1,
            skipped_steps=before.skipped_steps + 1,
            skipped_samples=before.skipped_samples + number,
            data=step.after,
        )
        if self.ledger is not None:
            self.ledger.write(self.position.step, step.samples, is_skipped=True)
            self.context.telemetry.count_samples("skipped", number)
        skipped = {"skipped_samples": float(self.position.skipped_samples)}
        self.context.telemetry.update(step=self.position.step, metrics=skipped)

    def _require_finite(self, value: float, what: str, step: LoadedStep) -> None:
        """Equal on all ranks, so they end together; the first one leaves word for the next attempt before they do."""
        if math.isfinite(value):
            return
        context, failed = self.context, self.position.step + 1
        skips = widen(self.skips, failed, self.steps)
        if context.is_first:
            record = NonFinite(
                attempt=context.stage.attempt,
                step=failed,
                quantity=what,
                value=str(value),
                samples=step.samples,
                max_resume_step=skips[-1].first - 1,
                skips=skips,
            )
            write_atomic(non_finite_path(context.files, context.stage.attempt), encode(record))
        dist.barrier()
        raise NonFiniteError(
            f"the {what} is {value} at step {failed} of {self.steps}; the next attempt leaves out the data of steps "
            f"{skips[-1].first} to {skips[-1].last}; if it comes again, look at that data, or lower learningRate"
        )

    def _end_step(self) -> None:
        step, is_asked = self.position.step, self.context.preemption.should_stop()
        if is_asked or step % self.config.checkpoint_steps == 0 or step == self.steps:
            saved = self.save()
            if is_asked or self.context.preemption.should_stop():
                raise Preempted(f"stopped on request at step {saved.step} of {self.steps}", checkpoint=saved)

    def save(self) -> Checkpoint:
        """A checkpoint of the position; the older ones are pruned. Raises Preempted in an attempt that is cut off."""
        context, position = self.context, self.position
        folder = context.files.checkpoint_dir(context.stage.attempt, position.step)
        context.telemetry.update(phase="checkpointing")
        if context.is_first:
            check_not_superseded(context.files, context.stage.attempt)
        if self.ledger is not None:
            self.ledger.sync()
        with self.meter.part("checkpoint"), context.telemetry.activity("checkpoint"):
            checkpoints.save(folder, self.engine.fragments(), digest=context.stage.digest, position=position)
        if context.is_first:
            prune(context.files, context.stage.attempt, self.config.keep_checkpoints)
        saved = Checkpoint(step=position.step, path=context.files.relative_path(folder))
        context.telemetry.update(phase="running", checkpoint=saved)
        return saved
