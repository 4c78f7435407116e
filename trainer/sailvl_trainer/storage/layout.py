"""Where a stage keeps its files on the shared storage, and how its result is written and found again.

<storage>/results/<digest>.json                 points to the output that holds the result of a digest
<storage>/<run>/<stage>-<digest12>/             the stage's output
    config.json  result.json
    attempts/<attempt>.json                     see lineage.py
    checkpoints/attempt-0001/step-00000010/     one directory per attempt
    export/  shards/  held-out/  report/
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sailvl_trainer import contract
from sailvl_trainer.contract import Checkpoint, Result, Stage
from sailvl_trainer.storage.codec import decode, encode, keep_finite
from sailvl_trainer.storage.files import write_atomic


class StageFiles:
    """The directories of one stage on the shared storage."""

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
        """Return the newest complete checkpoint of an attempt: its manifest is written last."""
        found = sorted(self.checkpoint_dir(attempt, 0).parent.glob(f"step-*/{contract.MANIFEST_FILE}"))
        return self.build_checkpoint(found[-1]) if found else None

    def build_checkpoint(self, manifest: Path) -> Checkpoint:
        """Return the checkpoint that a manifest belongs to."""
        folder = manifest.parent
        return Checkpoint(step=int(folder.name.removeprefix("step-")), path=self.relative_path(folder))

    def find_result(self) -> Result | None:
        """Return the stage's result, or that of another run with the same digest; None if it has to be computed."""
        result = _read_result(self.output)
        if result is None and self._result_pointer.exists():
            result = _read_result(self.storage / decode(dict[str, str], self._result_pointer.read_bytes())["output"])
        if result is None or result.digest != self._digest:
            return None
        return replace(result, reused=True)

    def read_result(self) -> Result:
        """Return the result that this attempt's first rank wrote or found.

        Raises FileNotFoundError if there is none.
        """
        found = _read_result(self.output) or self.find_result()
        if found is None:
            raise FileNotFoundError(f"{self.output / contract.RESULT_FILE} is missing, although all ranks succeeded")
        return found

    def write_result(self, result: Result) -> None:
        """Write the result, after everything else of the stage, and then the pointer by which other runs find it."""
        finite = replace(result, metrics=keep_finite(result.metrics))
        write_atomic(self.output / contract.RESULT_FILE, encode(finite))
        write_atomic(self._result_pointer, encode({"output": self.relative_path(self.output)}))


def _read_result(output: Path) -> Result | None:
    path = output / contract.RESULT_FILE
    return decode(Result, path.read_bytes()) if path.exists() else None
