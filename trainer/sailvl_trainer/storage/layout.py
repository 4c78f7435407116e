"""Where a stage keeps its files on the shared storage, and how its result is written and found again.

<storage>/results/<digest>.json                 points to the output that holds the result of a digest
<storage>/<run>/verified/
    *.jsonl                                     see verified_files.py
    <stage>-<digest12>-<attempt>.json           points to the other output whose result an attempt reuses
<storage>/<run>/<stage>-<digest12>/             the stage's output
    config.json  result.json
    attempts/<attempt>.json                     see lineage.py
    checkpoints/attempt-0001/step-00000010/     one directory per attempt
    export/  shards/  held-out/  report/
"""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path

from sailvl_trainer import contract
from sailvl_trainer.contract import Checkpoint, Result, ResultPointer, Stage
from sailvl_trainer.storage.codec import keep_finite
from sailvl_trainer.storage.data_files import DataRoots
from sailvl_trainer.storage.documents import (
    UnusableDocumentError,
    find_document,
    is_count,
    resolve_below,
    write_document,
)
from sailvl_trainer.storage.files import is_existing, list_names

CHECKPOINT_PATH = re.compile(r"/attempt-(\d{4,9})/step-(\d{8,15})\Z", re.ASCII)
MAX_METRICS = 1000
MAX_METRIC_LENGTH = 253

logger = logging.getLogger(__name__)


class StageFiles:
    """The directories of one stage on the shared storage."""

    def __init__(self, stage: Stage) -> None:
        self.storage = Path(stage.storage)
        self.roots = DataRoots.resolve(self.storage)
        self.output = Path(stage.output)
        self.run = self.output.parent
        self.verified = self.run / contract.VERIFIED_DIR
        self.checkpoints = self.output / contract.CHECKPOINTS_DIR
        self.attempts = self.output / contract.ATTEMPTS_DIR
        self.export = self.output / contract.EXPORT_DIR
        self.shards = self.output / contract.SHARDS_DIR
        self.held_out = self.output / contract.HELD_OUT_DIR
        self.report = self.output / contract.REPORT_DIR
        self._digest = stage.digest
        self._reused = self.verified / f"{self.output.name}-{stage.attempt}.json"
        self._result_pointer = self.storage / contract.RESULTS_DIR / f"{stage.digest}.json"

    def relative_path(self, path: Path) -> str:
        """Return a path relative to the root of the storage, as documents of the contract hold it."""
        return str(path.relative_to(self.storage))

    def checkpoint_dir(self, attempt: int, step: int) -> Path:
        """Return the directory of a checkpoint.

        Each attempt has its own directory, so that a superseded attempt that still runs can't write into another's.
        """
        return self.checkpoints / f"attempt-{attempt:04d}" / f"step-{step:08d}"

    def find_newest_checkpoint(self, attempt: int) -> Checkpoint | None:
        """Return the newest complete checkpoint of an attempt."""
        return next(iter(self.list_checkpoints(attempt)), None)

    def list_checkpoints(self, attempt: int) -> list[Checkpoint]:
        """Return the complete checkpoints of an attempt, newest first; the manifest of one is written last.

        Raises StorageError if they can't be listed.
        """
        folder = self.checkpoint_dir(attempt, 0).parent
        folders = (folder / name for name in list_names(folder))
        complete = (f for f in folders if f.name.startswith("step-") and is_existing(f / contract.MANIFEST_FILE))
        found = (self.parse_checkpoint_path(self.relative_path(path)) for path in complete)
        return sorted((c for _, c in filter(None, found)), key=lambda checkpoint: checkpoint.step, reverse=True)

    def parse_checkpoint_path(self, path: str) -> tuple[int, Checkpoint] | None:
        """Return attempt and checkpoint of a path relative to the storage; None if no checkpoint has such a path."""
        found = CHECKPOINT_PATH.search(path)
        if found is None:
            return None
        attempt, step = int(found[1]), int(found[2])
        is_own = path == self.relative_path(self.checkpoint_dir(attempt, step))
        return (attempt, Checkpoint(step=step, path=path)) if is_own else None

    def find_usable_result(self) -> Result | None:
        """Return the result in the stage's own output, or the one that this attempt reuses; None if there is neither.

        A result that can't be used counts as missing. Raises StorageError if it can't be read.
        """
        result = self._read_result(self.output) or self._follow(self._reused)
        return None if result is None else replace(result, reused=True)

    def find_other_result(self) -> Result | None:
        """Return the result of another run with the same digest; None if there is none.

        The files that it describes aren't read: until their hashes are verified, the result must not be used. Raises
        StorageError if it can't be read.
        """
        result = self._follow(self._result_pointer)
        return None if result is None else replace(result, reused=True)

    def find_result(self) -> Result | None:
        """Return a usable result, else that of another run, which may be damaged; None if there is neither."""
        return self.find_usable_result() or self.find_other_result()

    def record_reuse(self, result: Result) -> None:
        """Record that this attempt reuses a result, whose files were verified; all of its workers believe it."""
        if not self.is_own(result):
            write_document(self._reused, ResultPointer(output=result.output))

    def is_own(self, result: Result) -> bool:
        """Whether a result is in this stage's output, and not in that of another run."""
        return result.output == self.relative_path(self.output)

    def is_from_this_run(self, path: Path) -> bool:
        """Return whether a file or directory is in this run's own directory, so that no other run wrote it."""
        return DataRoots.resolve(self.run).contains(os.path.realpath(path))

    def read_result(self) -> Result:
        """Return the result that this attempt's first rank wrote or found.

        Raises FileNotFoundError if there is none, StorageError if it can't be read.
        """
        found = self._read_result(self.output) or self.find_usable_result()
        if found is None:
            raise FileNotFoundError(f"{self.output / contract.RESULT_FILE} is missing, although all ranks succeeded")
        return found

    def write_result(self, result: Result) -> None:
        """Write the result, after everything else of the stage, and then the pointer by which other runs find it.

        Raises ValueError if the result has a value with which it would not be read again.
        """
        result = replace(result, metrics=keep_finite(result.metrics), seconds=max(0.0, result.seconds))
        if problem := _describe_invalid(result):
            raise ValueError(f"the result of stage {result.stage} can't be written: {problem}")
        write_document(self.output / contract.RESULT_FILE, result)
        pointer = ResultPointer(output=self.relative_path(self.output))
        write_document(self._result_pointer, pointer)

    def _follow(self, path: Path) -> Result | None:
        """Return the result that the pointer at a path leads to."""
        pointer = find_document(ResultPointer, path, self.roots, should_set_aside=True)
        if pointer is None:
            return None
        try:
            return self._read_result(resolve_below(self.storage, pointer.output))
        except UnusableDocumentError as error:
            logger.warning("%s is not used: %s", path, error)
            return None

    def _read_result(self, output: Path) -> Result | None:
        """Return the result in a directory; None if there is none, or none of this digest."""

        def check(result: Result) -> str:
            if result.output != self.relative_path(output):
                return f"its output is {result.output[:100]!r}, but it is in {output}"
            return _describe_invalid(result)

        path, is_own = output / contract.RESULT_FILE, output == self.output
        result = find_document(Result, path, self.roots, check=check, should_set_aside=is_own)
        return result if result is not None and result.digest == self._digest else None


def _describe_invalid(result: Result) -> str:
    """Return what is wrong with a result's values; empty if nothing is."""
    if not is_count(result.attempt, result.steps, result.tokens, result.samples, result.lost_steps, result.seconds):
        return "it has a negative or too large number"
    if len(result.metrics) > MAX_METRICS or any(len(name) > MAX_METRIC_LENGTH for name in result.metrics):
        return f"it has more than {MAX_METRICS} metrics, or one with a name of more than {MAX_METRIC_LENGTH} characters"
    return "" if all(map(math.isfinite, result.metrics.values())) else "it has a metric that is not finite"
