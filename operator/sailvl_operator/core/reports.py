"""Decode the reports of workers: answers of /progress, and termination messages.

Neither is trustworthy: any container image may answer on a pod's address, and the user chooses it. What is returned
fits into the status: counts are not negative and bounded, numbers are finite, paths lead below the storage, and text
is cleaned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePosixPath

from sailvl_operator.api.untrusted import (
    MAX_COUNT,
    MAX_NAME_LENGTH,
    MAX_SECONDS,
    DocumentError,
    clean_end,
    clean_line,
    decode_json,
    is_metric_name,
)
from sailvl_operator.core.observe import PodRecord, Terminated
from sailvl_trainer.contract import TERMINATION_MESSAGE_BYTES, Checkpoint, Progress, Result, Termination

MAX_PROGRESS_BYTES = 65536
"""Largest answer of /progress, in bytes."""
MAX_METRICS = 64
"""Metrics of a stage that its status keeps, the first ones by name."""
MAX_MESSAGE_LENGTH = 1000
MAX_TRACEBACK_LENGTH = 2000

_MAX_ACTIVITIES = 64
"""Activities of one report, of which each belongs to a goodput bucket."""
_MAX_SUMMED_COUNT = MAX_COUNT // 10_000
_MAX_PATH_LENGTH = 1024


def decode_progress(content: bytes | bytearray) -> Progress:
    """Decode an answer of /progress. Raises DocumentError if it can't be used."""
    report: Progress = decode_json(content, Progress, subject="/progress", max_bytes=MAX_PROGRESS_BYTES)
    _check_counts(
        attempt=report.attempt,
        step=report.step,
        steps=report.steps,
        tokens=report.tokens,
        samples=report.samples,
    )
    _check_summed_counts(lost_steps=report.lost_steps, in_place_restarts=report.in_place_restarts)
    return replace(
        report,
        eta_seconds=None if report.eta_seconds is None else _bound_seconds(report.eta_seconds),
        metrics=_select_metrics(report.metrics),
        checkpoint=_check_checkpoint(report.checkpoint),
        seconds=_bound_activities(report.seconds),
        time=_bound_seconds(report.time),
    )


def build_terminated(*, exit_code: int, message: str, reason: str = "", finished: float = 0.0) -> Terminated:
    """Build the terminated state of a worker's container, with its termination message decoded if that is a report.

    A message that was cut off or can't be used as a report is treated like the tail of the worker's log.
    """
    report = None
    with suppress(DocumentError):
        report = _decode_termination(message) if message else None
    text = clean_end(message, MAX_TRACEBACK_LENGTH) if report is None else ""
    return Terminated(exit_code=exit_code, reason=reason, message=text, report=report, finished=finished)


def find_reports(pods: Sequence[PodRecord]) -> Iterator[Termination]:
    """Yield the reports in the termination messages of pods."""
    for pod in pods:
        if pod.terminated is not None and pod.terminated.report is not None:
            yield pod.terminated.report


def _decode_termination(message: str) -> Termination:
    subject = "termination message"
    termination: Termination = decode_json(message, Termination, subject=subject, max_bytes=TERMINATION_MESSAGE_BYTES)
    return _check_termination(termination)


def _check_termination(termination: Termination) -> Termination:
    _check_counts(rank=termination.rank or 0, superseded_by=termination.superseded_by)
    return replace(
        termination,
        checkpoint=_check_checkpoint(termination.checkpoint),
        result=None if termination.result is None else _check_result(termination.result),
        message=clean_line(termination.message, MAX_MESSAGE_LENGTH),
        traceback=clean_end(termination.traceback, MAX_TRACEBACK_LENGTH),
    )


def _check_result(result: Result) -> Result:
    _check_counts(
        attempt=result.attempt,
        steps=result.steps,
        tokens=result.tokens,
        samples=result.samples,
    )
    _check_summed_counts(lost_steps=result.lost_steps)
    return replace(
        result,
        stage=clean_line(result.stage, MAX_NAME_LENGTH),
        digest=clean_line(result.digest, MAX_NAME_LENGTH + 1),
        output=_check_path(result.output),
        seconds=_bound_seconds(result.seconds),
        metrics=_select_metrics(result.metrics),
    )


def _check_counts(limit: int = MAX_COUNT, **counts: int) -> None:
    for name, value in counts.items():
        if not 0 <= value <= limit:
            raise DocumentError(f"{name} is not between 0 and {limit}")


def _check_summed_counts(**counts: int) -> None:
    """Check numbers whose sum over all stages and attempts has to fit into the status."""
    _check_counts(_MAX_SUMMED_COUNT, **counts)


def _check_checkpoint(checkpoint: Checkpoint | None) -> Checkpoint | None:
    if checkpoint is not None:
        _check_counts(checkpoint_step=checkpoint.step)
        _check_path(checkpoint.path)
    return checkpoint


def _check_path(path: str) -> str:
    """Return a path, relative to the storage, that leads below it; raise DocumentError for any other."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or len(path) > _MAX_PATH_LENGTH or not path.isprintable():
        raise DocumentError("a path does not lead below the storage")
    return path


def _bound_seconds(value: float) -> float:
    return min(max(value, 0.0), MAX_SECONDS) if math.isfinite(value) else 0.0


def _bound_activities(seconds: Mapping[str, float]) -> dict[str, float]:
    if len(seconds) > _MAX_ACTIVITIES:
        raise DocumentError(f"there are more than {_MAX_ACTIVITIES} activities")
    return {clean_line(name, MAX_NAME_LENGTH): _bound_seconds(value) for name, value in seconds.items()}


def _select_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the first MAX_METRICS metrics by name; those with a name or a value that the status can't hold are left
    out."""
    usable = (name for name, value in metrics.items() if is_metric_name(name) and math.isfinite(value))
    return {name: metrics[name] for name in sorted(usable)[:MAX_METRICS]}
