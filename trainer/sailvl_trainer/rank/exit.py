"""How a rank ends: its words in the error file that the worker's agent reads, then os._exit.

An ordinary exit with a live gloo group becomes SIGABRT, and the cause is lost.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import Termination
from sailvl_trainer.errors import StorageError
from sailvl_trainer.rank.termination import fit
from sailvl_trainer.storage.documents import encode, write_atomic

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by torch's elastic agent for each rank."""


def end_rank(termination: Termination) -> NoReturn:
    """Leave the words, if there is something to say and somebody to read it, and end at once."""
    if termination.exit_code and ERROR_FILE in os.environ:
        try:
            write_atomic(Path(os.environ[ERROR_FILE]), encode(_as_error_file(termination)))
        except (OSError, StorageError) as error:  # the scratch folder is full: the code has to say it alone
            print(f"no words to the worker: {error}", file=sys.stderr)  # noqa: T201
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(termination.exit_code))


def _as_error_file(termination: Termination) -> dict[str, str]:
    """As torch.distributed.elastic.multiprocessing.errors.ProcessFailure reads it; it orders failures by the time."""
    return {"message": fit(termination).decode(), "timestamp": str(int(time.time()))}
