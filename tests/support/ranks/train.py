"""A rank that trains, for tests: the stage document at $STAGE; dies by SIGKILL after step $KILL_AT. No test itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from sailvl_trainer.train import stage, trainer
from tests.support.builders.training import join_ranks

SCRATCH, KILL_AT = Path(os.environ["SCRATCH"]), int(os.environ.get("KILL_AT", "0"))
LOSSES: list[float] = []
advance = trainer.Trainer._record_step


def advance_and_die(self: trainer.Trainer, step: Any, loss: float, *rest: Any) -> None:
    advance(self, step, loss, *rest)
    LOSSES.append(loss)
    if self.state.step == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    trainer.Trainer._record_step = advance_and_die  # type: ignore[method-assign]
    context = join_ranks()
    result = stage.run(context)
    if context.is_first:
        write_atomic(SCRATCH / "losses.json", encode(LOSSES))
        write_atomic(SCRATCH / "result.json", encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
