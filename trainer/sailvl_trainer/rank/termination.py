"""The termination message: at most 4,096 bytes, always whole JSON; the kubelet would cut a longer one in the middle."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import TERMINATION_MESSAGE_BYTES, Result, Termination
from sailvl_trainer.errors import StorageError
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import encode, keep_finite

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Set by torch's elastic agent for each rank."""
LEAST_MESSAGE = 200
"""Letters of the message that stay, whatever else has to go."""


def encode_termination(termination: Termination, limit: int = TERMINATION_MESSAGE_BYTES) -> bytes:
    """As much as fits: the traceback's beginning goes first, then the message's end, then the result's metrics."""
    termination = _make_encodable(termination)
    data = encode(termination)
    while len(data) > limit:
        termination = _shorten(termination)
        data = encode(termination)
    return data


def write_termination(path: Path, termination: Termination) -> None:
    """In place: the file is a mount that can't be renamed over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_termination(termination))


def _make_encodable(termination: Termination) -> Termination:
    """Names of files may hold half a surrogate pair, and results a NaN: JSON has neither."""
    return replace(
        termination,
        message=_repair(termination.message),
        traceback=_repair(termination.traceback),
        result=None if termination.result is None else _with_finite(termination.result),
    )


def _repair(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _with_finite(result: Result) -> Result:
    return replace(result, metrics=keep_finite(result.metrics))


def _shorten(termination: Termination) -> Termination:
    if termination.traceback:
        return replace(termination, traceback=termination.traceback[len(termination.traceback) // 8 + 1 :])
    if len(termination.message) > LEAST_MESSAGE:
        kept = max(LEAST_MESSAGE, len(termination.message) * 7 // 8)
        return replace(termination, message=termination.message[:kept])
    result = termination.result
    if result is not None and result.metrics:
        return replace(termination, result=replace(result, metrics=dict(list(result.metrics.items())[:-1])))
    return replace(termination, result=None, checkpoint=None)


def exit_rank(termination: Termination) -> NoReturn:
    """Leave the words, if there is something to say and somebody to read it, and end at once."""
    if termination.exit_code and ERROR_FILE_VARIABLE in os.environ:
        try:
            write_atomic(Path(os.environ[ERROR_FILE_VARIABLE]), encode(_as_error_file(termination)))
        except (OSError, StorageError) as error:  # the scratch folder is full: the code has to say it alone
            print(f"no words to the worker: {error}", file=sys.stderr)  # noqa: T201
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(termination.exit_code))


def _as_error_file(termination: Termination) -> dict[str, str]:
    """As torch.distributed.elastic.multiprocessing.errors.ProcessFailure reads it; it orders failures by the time."""
    return {"message": encode_termination(termination).decode(), "timestamp": str(int(time.time()))}
