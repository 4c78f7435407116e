"""A rank that evaluates, for tests: the stage document at $STAGE. No test itself."""

from __future__ import annotations

import os
from pathlib import Path

from sailvl_trainer.evaluate import stage
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode
from tests.support.builders.training import join_ranks

SCRATCH = Path(os.environ["SCRATCH"])


def main() -> None:
    context = join_ranks()
    result = stage.run(context)
    if context.is_first:
        write_atomic(SCRATCH / "result.json", encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
