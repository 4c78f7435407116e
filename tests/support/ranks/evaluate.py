"""Main program of a rank that runs an evaluate stage; the stage document is at $STAGE."""

from __future__ import annotations

import os
from pathlib import Path

from sailvl_trainer.evaluate import stage
from sailvl_trainer.storage.codec import encode
from sailvl_trainer.storage.files import write_atomic
from tests.support.builders.training import join_ranks

SCRATCH = Path(os.environ["SCRATCH"])


def main() -> None:
    """Run the stage; the first rank writes the result to $SCRATCH."""
    context = join_ranks()
    result = stage.run(context)
    if context.is_first:
        write_atomic(SCRATCH / "result.json", encode(result))
    os._exit(0)


if __name__ == "__main__":
    main()
