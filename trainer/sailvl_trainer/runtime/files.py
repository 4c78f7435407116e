"""Where a stage keeps its files, which checkpoint an attempt starts from, and whether the result is there already."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from sailvl_trainer import contract
from sailvl_trainer.contract import Checkpoint, Lineage, Result, Stage
from sailvl_trainer.runtime.documents import decode, encode, keep_finite, sync_directory, write_atomic


class StageFiles:
    """The directory of one stage on the shared storage."""

    def __init__(self, stage: Stage) -> None:
        self.storage = Path(stage.storage)
        self.output = Path(stage.output)
        self.checkpoints = self.output / contract.CHECKPOINTS_DIR
        self.attempts = self.output / contract.ATTEMPTS_DIR
        self.export = self.output / contract.EXPORT_DIR
        self.shards = self.output / contract.SHARDS_DIR
        self.held_out = self.output / contract.HELD_OUT_DIR
        self.report = self.output / contract.REPORT_DIR
        self._digest = stage.digest
        self._memo = self.storage / contract.MEMO_DIR / f"{stage.digest}.json"

    def relative(self, path: Path) -> str:
        """As documents name paths: from the storage's root."""
        return str(path.relative_to(self.storage))

    def checkpoint_dir(self, attempt: int, step: int) -> Path:
        """Each attempt has a directory of its own, so that a cut-off one writes nothing into another's."""
        return self.checkpoints / f"attempt-{attempt:04d}" / f"step-{step:08d}"

    def begin_attempt(self, attempt: int) -> Checkpoint | None:
        """The checkpoint that an attempt starts from; None: from the beginning. Called by one rank.

        The first call writes the attempt's lineage; a restart in place goes on from its own newest checkpoint.
        """
        lineage = self._read_lineage(attempt)
        if lineage is not None:
            return self.newest_checkpoint(attempt) or lineage.start
        start = self._find_start(attempt - 1)
        self._write_lineage(Lineage(attempt=attempt, start=start))
        return start

    def newest_checkpoint(self, attempt: int) -> Checkpoint | None:
        """The newest whole checkpoint of one attempt: its manifest is written last."""
        found = sorted(self.checkpoint_dir(attempt, 0).parent.glob(f"step-*/{contract.MANIFEST_FILE}"))
        if not found:
            return None
        folder = found[-1].parent
        return Checkpoint(step=int(folder.name.removeprefix("step-")), path=self.relative(folder))

    def find_result(self) -> Result | None:
        """The stage's result, its own or by the memo another run's; None: it has to be computed."""
        result = _read_result(self.output)
        if result is None and self._memo.exists():
            result = _read_result(self.storage / decode(dict[str, str], self._memo.read_bytes())["output"])
        if result is None or result.digest != self._digest:
            return None
        return replace(result, memoised=True)

    def read_result(self) -> Result:
        """The result that this attempt's first rank has written."""
        return decode(Result, (self.output / contract.RESULT_FILE).read_bytes())

    def write_result(self, result: Result) -> None:
        """Last of all, and whole; then the memo by which other runs find it."""
        finite = replace(result, metrics=keep_finite(result.metrics))
        write_atomic(self.output / contract.RESULT_FILE, encode(finite))
        write_atomic(self._memo, encode({"output": self.relative(self.output)}))

    def _find_start(self, attempt: int) -> Checkpoint | None:
        """The newest checkpoint on the chain of attempts that ends with `attempt`."""
        for earlier in range(attempt, 0, -1):
            newest = self.newest_checkpoint(earlier)
            if newest is not None:
                return newest
            lineage = self._read_lineage(earlier)
            if lineage is not None:
                return lineage.start
        return None

    def _lineage_path(self, attempt: int) -> Path:
        return self.attempts / f"{attempt}.json"

    def _read_lineage(self, attempt: int) -> Lineage | None:
        """None also for a file left empty by a machine that went down between creating and writing it."""
        path = self._lineage_path(attempt)
        data = path.read_bytes() if path.exists() else b""
        return decode(Lineage, data) if data else None

    def _write_lineage(self, lineage: Lineage) -> None:
        path, data = self._lineage_path(lineage.attempt), encode(lineage)
        try:
            _create(path, data)
        except FileExistsError:
            if path.read_bytes():
                raise
            write_atomic(path, data)


def _read_result(output: Path) -> Result | None:
    path = output / contract.RESULT_FILE
    return decode(Result, path.read_bytes()) if path.exists() else None


def _create(path: Path, data: bytes) -> None:
    """A file that must not be there yet. Raises FileExistsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
