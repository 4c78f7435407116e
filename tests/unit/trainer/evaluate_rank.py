"""A rank that evaluates, for tests: the stage document at $STAGE. No test itself."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sailvl_trainer.evaluate import stage
from sailvl_trainer.runtime.context import build_context
from sailvl_trainer.runtime.documents import encode, read_stage, write_atomic
from sailvl_trainer.runtime.scratch import Scratch

RANK, SCRATCH = int(os.environ["RANK"]), Path(os.environ["SCRATCH"])


def main() -> None:
    torch.set_num_threads(1)
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
        write_atomic(SCRATCH / "result.json", encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
