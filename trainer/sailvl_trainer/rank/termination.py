"""Terminations: how a rank leaves its own to the worker and exits, and how the worker writes the container's.

A termination message has at most 4096 bytes and is always complete JSON: the kubelet would truncate a longer one.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sailvl_trainer.contract import TERMINATION_MESSAGE_BYTES, Result, Termination
from sailvl_trainer.errors import StorageError
from sailvl_trainer.storage.codec import encode, keep_finite
from sailvl_trainer.storage.files import write_atomic

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Variable in which torch's elastic agent passes each rank the path of its error file."""
MIN_MESSAGE_CHARACTERS = 200
"""Characters of the message that are kept, whatever else has to be dropped."""


def exit_rank(termination: Termination) -> NoReturn:
    """Write the termination of a failed rank to the agent's error file and exit at once.

    os._exit is used because at an ordinary exit, with a live gloo group, the process aborts and its code is lost.
    """
    if termination.exit_code and ERROR_FILE_VARIABLE in os.environ:
        try:
            write_atomic(Path(os.environ[ERROR_FILE_VARIABLE]), encode(_build_error_file(termination)))
        except (OSError, StorageError) as error:  # the scratch directory is full; only the exit code reports the cause
            print(f"can't write the error report for the worker: {error}", file=sys.stderr)  # noqa: T201
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(termination.exit_code))


def write_termination(path: Path, termination: Termination) -> None:
    """Write a container's termination message, in place because the kubelet mounts the file itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_termination(termination))


def encode_termination(termination: Termination, limit: int = TERMINATION_MESSAGE_BYTES) -> bytes:
    """Encode a termination in at most `limit` bytes of JSON.

    If it is too long, the start of the traceback is dropped first, then the end of the message, then the last metrics
    of the result.
    """
    termination = _make_encodable(termination)
    data = encode(termination)
    while len(data) > limit:
        termination = _shorten(termination)
        data = encode(termination)
    return data


def _build_error_file(termination: Termination) -> dict[str, str]:
    """Return the error file as torch.distributed.elastic's ProcessFailure reads it; it sorts failures by timestamp."""
    return {"message": encode_termination(termination).decode(), "timestamp": str(int(time.time()))}


def _make_encodable(termination: Termination) -> Termination:
    """Replace what JSON can't represent: lone surrogates from file names, and NaN in the metrics of a result."""
    return replace(
        termination,
        message=_replace_surrogates(termination.message),
        traceback=_replace_surrogates(termination.traceback),
        result=None if termination.result is None else _drop_non_finite(termination.result),
    )


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _drop_non_finite(result: Result) -> Result:
    return replace(result, metrics=keep_finite(result.metrics))


def _shorten(termination: Termination) -> Termination:
    """Drop an eighth of the part that is dropped next."""
    if termination.traceback:
        return replace(termination, traceback=termination.traceback[len(termination.traceback) // 8 + 1 :])
    if len(termination.message) > MIN_MESSAGE_CHARACTERS:
        length = max(MIN_MESSAGE_CHARACTERS, len(termination.message) * 7 // 8)
        return replace(termination, message=termination.message[:length])
    result = termination.result
    if result is not None and result.metrics:
        return replace(termination, result=replace(result, metrics=dict(list(result.metrics.items())[:-1])))
    return replace(termination, result=None, checkpoint=None)
