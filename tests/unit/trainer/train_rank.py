"""A rank that trains, for tests: the stage document at $STAGE; dies by SIGKILL after step $KILL_AT. No test itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from sailvl_trainer.runtime.context import build_context
from sailvl_trainer.runtime.documents import encode, read_stage, write_atomic
from sailvl_trainer.runtime.scratch import Scratch
from sailvl_trainer.train import loop, stage

RANK, SCRATCH, KILL_AT = int(os.environ["RANK"]), Path(os.environ["SCRATCH"]), int(os.environ.get("KILL_AT", "0"))
LOSSES: list[float] = []
advance = loop.Loop._advance


def advance_and_die(self: loop.Loop, step: Any, loss: float, *rest: Any) -> None:
    advance(self, step, loss, *rest)
    LOSSES.append(loss)
    if self.position.step == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    loop.Loop._advance = advance_and_die  # type: ignore[method-assign]
    scratch = SCRATCH / f"rank-{RANK}"
    scratch.mkdir()
    context = build_context(
        read_stage(Path(os.environ["STAGE"])),
        device=torch.device("cpu"),
        rank=RANK,
        local_rank=0,
        scratch=Scratch(scratch),
    )
    result = stage.run(context)
    if RANK == 0:
        write_atomic(SCRATCH / "losses.json", encode(LOSSES))
        write_atomic(SCRATCH / "result.json", encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
