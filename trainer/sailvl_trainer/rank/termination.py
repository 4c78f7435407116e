"""The termination message: at most 4,096 bytes, always whole JSON; the kubelet would cut a longer one in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sailvl_trainer.contract import TERMINATION_MESSAGE_BYTES, Result, Termination
from sailvl_trainer.storage.documents import encode, keep_finite

LEAST_MESSAGE = 200
"""Letters of the message that stay, whatever else has to go."""


def fit(termination: Termination, limit: int = TERMINATION_MESSAGE_BYTES) -> bytes:
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
    path.write_bytes(fit(termination))


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
