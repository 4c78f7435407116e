"""The training loop: optimizer steps from a checkpoint, or the beginning, to the end of the budget.

A step is: get the next planned batch, run forward and backward on this rank's microbatches, update the weights, record
progress, save a checkpoint if one is due. Called by the pretrain and sft stages.
"""

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
from sailvl_trainer.storage.documents import write_document
from sailvl_trainer.storage.lineage import check_not_superseded, non_finite_path
from sailvl_trainer.train.checkpoint import delete_old_checkpoints, save_checkpoint
from sailvl_trainer.train.checkpoint_manifest import TrainingState
from sailvl_trainer.train.engine import Engine, check_frozen
from sailvl_trainer.train.optimizer import build_schedule
from sailvl_trainer.train.sample_log import SampleLog
from sailvl_trainer.train.setup import TrainingSetup
from sailvl_trainer.train.skip_policy import widen_skip_window
from sailvl_trainer.train.throughput import FlopsCounter, StepTimer, build_flops_counter, get_peak_flops


@dataclass(kw_only=True, slots=True)
class Trainer:
    """Runs the optimizer steps of one attempt on this rank; every rank has one and calls the same methods."""

    context: Context
    config: TrainConfig
    setup: TrainingSetup
    engine: Engine
    state: TrainingState
    """Progress so far; replaced after each step and saved with each checkpoint."""
    skips: tuple[Skip, ...] = ()
    """Step ranges whose data is skipped, because it made an earlier attempt's loss or gradient non-finite."""
    schedule: Callable[[int], float] = field(init=False)
    timer: StepTimer = field(init=False)
    flops: FlopsCounter = field(init=False)
    sample_log: SampleLog | None = field(init=False)
    """None on all ranks but the first."""

    def __post_init__(self) -> None:
        context = self.context
        self.schedule = build_schedule(self.config, self.steps)
        is_bf16 = self.config.precision == "bf16" and context.device.type != "cpu"
        self.timer = StepTimer(
            world_size=context.world_size,
            pack_tokens=self.config.pack_tokens,
            peak_flops=get_peak_flops(context.device, is_bf16=is_bf16),
        )
        self.flops = build_flops_counter(self.setup.model, self.setup.preset, self.config.train)
        self.sample_log = SampleLog(context.files, context.stage.attempt) if context.is_first else None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole budget."""
        return self.setup.steps

    def run(self) -> None:
        """Train until the budget is used up, and save a last checkpoint, so that later failures repeat no step.

        Raises Preempted, after saving a checkpoint, if a stop was requested; NonFiniteError for a NaN or an infinity.
        """
        context, is_checked = self.context, False
        context.telemetry.update(phase="running", step=self.state.step, steps=self.steps, unit="steps")
        loaded_steps = load_steps(
            self.setup.planner,
            self.setup.dataset,
            self.setup.encoder,
            self.state.data,
            rank=context.rank,
            world_size=context.world_size,
            first_step=self.state.step + 1,
            skips=self.skips,
        )
        while self.state.step < self.steps:
            with self.timer.phase("data"), context.telemetry.activity("dataWait"):
                step = next(loaded_steps)
            if step.is_skipped:
                self._skip_step(step)
            else:
                with context.telemetry.activity("training"):
                    self.train_step(step)
                if not is_checked:
                    check_frozen(self.engine, self.setup.trainable_names)
                    is_checked = True
            self._maybe_checkpoint()

    def train_step(self, step: LoadedStep) -> None:
        """Make one update with the gradient of the mean loss over the loss tokens of all ranks and microbatches."""
        local = sum(batch.loss_tokens for batch in step.batches), self.flops.count(step.batches)
        loss_tokens, flops = sum_over_ranks(*local)
        loss_sum = 0.0
        for batch in step.batches:
            with self.timer.phase("forward"):
                loss = self.engine.module(**batch.to(self.context.device).model_inputs)
                loss_sum += float(loss.detach())
            with self.timer.phase("backward"):
                self.engine.backward(loss, int(loss_tokens))
        mean_loss = sum_over_ranks(loss_sum)[0] / max(1, int(loss_tokens))
        self._check_finite(mean_loss, "loss", step)
        learning_rate = self.schedule(self.state.step)
        with self.timer.phase("step"):
            gradient_norm = self.engine.step(learning_rate)
        self._check_finite(gradient_norm, "gradient norm", step)
        metrics = {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
        self._record_step(step, mean_loss, flops, metrics)

    def _record_step(self, step: LoadedStep, loss: float, flops: float, metrics: dict[str, float]) -> None:
        """Advance the state, log the step's samples and publish its metrics; `flops` counts all ranks."""
        before = self.state
        self.state = replace(
            before,
            step=before.step + 1,
            tokens=before.tokens + step.tokens,
            samples=before.samples + len(step.samples),
            loss=loss,
            data=step.next_position,
        )
        if self.sample_log is not None:
            self.sample_log.write(self.state.step, step.samples)
        measured = self.timer.end_step(
            tokens=step.tokens, microbatches=len(step.batches), flops=flops, now=time.monotonic()
        )
        self.context.telemetry.count_samples("trained", sum(len(batch.samples) for batch in step.batches))
        self.context.telemetry.update(
            step=self.state.step,
            tokens=self.state.tokens,
            samples=self.state.samples,
            eta_seconds=self.timer.mean_step_seconds * (self.steps - self.state.step),
            metrics={"loss": loss, "loader_queue": step.ready_batches} | metrics | measured,
        )

    def _skip_step(self, step: LoadedStep) -> None:
        """Count the step as done without an update, and log its samples as skipped."""
        before, samples = self.state, len(step.samples)
        self.state = replace(
            before,
            step=before.step + 1,
            skipped_steps=before.skipped_steps + 1,
            skipped_samples=before.skipped_samples + samples,
            data=step.next_position,
        )
        if self.sample_log is not None:
            self.sample_log.write(self.state.step, step.samples, is_skipped=True)
            self.context.telemetry.count_samples("skipped", samples)
        skipped = {"skipped_samples": float(self.state.skipped_samples)}
        self.context.telemetry.update(step=self.state.step, metrics=skipped)

    def _check_finite(self, value: float, quantity: str, step: LoadedStep) -> None:
        """Raise NonFiniteError for a NaN or an infinity, after recording which data the next attempt has to skip.

        The value is equal on all ranks, so that all of them raise; none does before the first one has written the
        record.
        """
        if math.isfinite(value):
            return
        context, failed = self.context, self.state.step + 1
        skips = widen_skip_window(self.skips, failed, self.steps)
        if context.is_first:
            record = NonFinite(
                attempt=context.stage.attempt,
                step=failed,
                quantity=quantity,
                value=str(value),
                samples=step.samples,
                max_resume_step=skips[-1].first - 1,
                skips=skips,
            )
            write_document(non_finite_path(context.files, context.stage.attempt), record)
        dist.barrier()
        raise NonFiniteError(
            f"the {quantity} is {value} at step {failed} of {self.steps}; the next attempt will skip the data of "
            f"{_format_steps(skips[-1])}; if it happens again, check that data, or lower learningRate"
        )

    def _maybe_checkpoint(self) -> None:
        """Save at every checkpointSteps, after the last step and on a stop request. COLLECTIVE."""
        step, is_stopping = self.state.step, self.context.preemption.should_stop()
        if is_stopping or step % self.config.checkpoint_steps == 0 or step == self.steps:
            checkpoint = self.save()
            if is_stopping or self.context.preemption.should_stop():
                message = f"stopped on request at step {checkpoint.step} of {self.steps}"
                raise Preempted(message, checkpoint=checkpoint)

    def save(self) -> Checkpoint:
        """Save a checkpoint of the current state and delete the old ones. Raises Preempted in a superseded attempt."""
        context, state = self.context, self.state
        folder = context.files.checkpoint_dir(context.stage.attempt, state.step)
        context.telemetry.update(phase="checkpointing")
        if context.is_first:
            check_not_superseded(context.files, context.stage.attempt)
        if self.sample_log is not None:
            self.sample_log.sync()
        with self.timer.phase("checkpoint"), context.telemetry.activity("checkpoint"):
            save_checkpoint(folder, self.engine.fragments(), digest=context.stage.digest, state=state)
        if context.is_first:
            delete_old_checkpoints(context.files, context.stage.attempt, self.config.keep_checkpoints)
        checkpoint = Checkpoint(step=state.step, path=context.files.relative_path(folder))
        context.telemetry.update(phase="running", checkpoint=checkpoint)
        return checkpoint


def _format_steps(skip: Skip) -> str:
    return f"step {skip.first}" if skip.first == skip.last else f"steps {skip.first} to {skip.last}"
