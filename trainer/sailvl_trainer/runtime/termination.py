"""The termination message: at most 4,096 bytes, always whole JSON; the kubelet would cut a longer one in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sailvl_trainer.contract import TERMINATION_MESSAGE_BYTES, Termination
from sailvl_trainer.runtime.documents import encode


def fit(termination: Termination, limit: int = TERMINATION_MESSAGE_BYTES) -> bytes:
    """As much as fits: the traceback's beginning goes first, then the message's end, then metrics."""
    data = encode(termination)
    while len(data) > limit:
        termination = _shorten(termination)
        data = encode(termination)
    return data


def write_termination(path: Path, termination: Termination) -> None:
    """In place: the file is a mount that can't be renamed over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(fit(termination))


def _shorten(termination: Termination) -> Termination:
    if termination.traceback:
        return replace(termination, traceback=termination.traceback[len(termination.traceback) // 4 + 1 :])
    if len(termination.message) > 200:
        return replace(termination, message=termination.message[: len(termination.message) * 3 // 4])
    result = termination.result
    assert result is not None, "nothing else can be long"
    if result.metrics:
        return replace(termination, result=replace(result, metrics=dict(list(result.metrics.items())[:-1])))
    return replace(termination, result=None)
