"""The main module of ranks in tests of their worker: it joins the process group and plays the scenario $SCENARIO."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from sailvl_trainer.contract import Checkpoint, Result, Termination
from sailvl_trainer.errors import ConfigError, Preempted
from sailvl_trainer.rank.context import Context, build_context
from sailvl_trainer.rank.distributed import sum_over_ranks
from sailvl_trainer.rank.exceptions import build_termination
from sailvl_trainer.rank.settings import Scratch, read_settings
from sailvl_trainer.rank.termination import exit_rank
from sailvl_trainer.storage.codec import read_stage

RANK = int(os.environ["RANK"])
RESTART = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
LAST = int(os.environ["WORLD_SIZE"]) - 1


def succeed(context: Context) -> None:
    for step in range(1, 4):
        context.telemetry.count_samples("trained")
        context.telemetry.update(step=step, steps=3, tokens=10 * step, metrics={"loss": 1 / step, "odd": float("nan")})
        sum_over_ranks(1.0)


def reject_settings(context: Context) -> None:
    if context.rank == LAST:
        raise ConfigError("learningRate is 7; set less")
    sum_over_ranks(1.0)  # the other ranks wait in a collective while this one dies


def crash_once(context: Context) -> None:
    succeed(context)
    if context.rank == LAST and not RESTART:
        sys.exit(f"the first start of rank {RANK} ends here")
    sum_over_ranks(1.0)


def kill_last_rank(context: Context) -> None:
    if context.rank == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_over_ranks(1.0)


def hang_last_rank(context: Context) -> None:
    context.telemetry.update(phase="running", step=7)
    if context.rank == LAST:
        sleep_forever()
    sum_over_ranks(1.0)


def sleep_forever() -> None:
    time.sleep(600)


def step_until_stopped(context: Context) -> None:
    for step in range(1, 100_000):
        context.telemetry.update(phase="running", step=step)
        if context.preemption.should_stop():
            raise Preempted(f"stopped at {step}", checkpoint=Checkpoint(step=step, path="demo/c"))
        time.sleep(0.02)


def ignore_stop_file(context: Context) -> None:
    context.telemetry.update(phase="checkpointing", step=1)
    time.sleep(600)


def never_finish_starting(context: Context) -> None:
    time.sleep(600)


def segfault(context: Context) -> None:
    ctypes.string_at(0)


def exhaust_memory(context: Context) -> None:
    context.telemetry.update(phase="running", step=7)
    (b"x" * (256 << 20)) * 64


SCENARIOS: dict[str, Callable[[Context], None]] = {
    f.__name__: f
    for f in (
        succeed,
        reject_settings,
        crash_once,
        kill_last_rank,
        hang_last_rank,
        step_until_stopped,
        ignore_stop_file,
        never_finish_starting,
        segfault,
        exhaust_memory,
    )
}


def main() -> None:
    settings = read_settings(os.environ)
    local = int(os.environ["LOCAL_RANK"])
    stage = read_stage(settings.stage_file)
    try:
        context = build_context(
            stage, device=torch.device("cpu"), rank=RANK, local_rank=local, scratch=Scratch(settings.scratch)
        )
        SCENARIOS[os.environ["SCENARIO"]](context)
        if context.is_first:
            result = Result(
                stage=stage.stage,
                kind=stage.kind,
                digest=stage.digest,
                attempt=stage.attempt,
                output=context.files.relative_path(Path(stage.output)),
                steps=context.world_size,
            )
            context.files.write_result(replace(result, metrics={"loss": 0.5, "odd": float("nan")}))
        dist.barrier()
    except BaseException as error:  # noqa: BLE001  # as rank/main.py does
        traceback.print_exc()
        exit_rank(build_termination(error, RANK))
    exit_rank(Termination(exit_code=0))


if __name__ == "__main__":
    main()
