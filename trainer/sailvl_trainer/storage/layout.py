"""Where a stage keeps its files, and whether the result is there already; see lineage.py for its attempts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sailvl_trainer import contract
from sailvl_trainer.contract import Checkpoint, Result, Stage
from sailvl_trainer.storage.atomic import write_atomic
from sailvl_trainer.storage.codec import decode, encode, keep_finite


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
        self._memo = self.storage / contract.RESULTS_DIR / f"{stage.digest}.json"

    def relative_path(self, path: Path) -> str:
        """As documents name paths: from the storage's root."""
        return str(path.relative_to(self.storage))

    def checkpoint_dir(self, attempt: int, step: int) -> Path:
        """Each attempt has a directory of its own, so that a cut-off one writes nothing into another's."""
        return self.checkpoints / f"attempt-{attempt:04d}" / f"step-{step:08d}"

    def find_newest_checkpoint(self, attempt: int) -> Checkpoint | None:
        """The newest whole checkpoint of one attempt: its manifest is written last."""
        found = sorted(self.checkpoint_dir(attempt, 0).parent.glob(f"step-*/{contract.MANIFEST_FILE}"))
        return self.build_checkpoint(found[-1]) if found else None

    def build_checkpoint(self, manifest: Path) -> Checkpoint:
        """The checkpoint with this manifest."""
        folder = manifest.parent
        return Checkpoint(step=int(folder.name.removeprefix("step-")), path=self.relative_path(folder))

    def find_result(self) -> Result | None:
        """The stage's result, its own or by the memo another run's; None: it has to be computed."""
        result = _read_result(self.output)
        if result is None and self._memo.exists():
            result = _read_result(self.storage / decode(dict[str, str], self._memo.read_bytes())["output"])
        if result is None or result.digest != self._digest:
            return None
        return replace(result, reused=True)

    def read_result(self) -> Result:
        """The result that this attempt's first rank has written, or has found. Raises FileNotFoundError."""
        found = _read_result(self.output) or self.find_result()
        if found is None:
            raise FileNotFoundError(f"{self.output / contract.RESULT_FILE} is not there, though the ranks ended well")
        return found

    def write_result(self, result: Result) -> None:
        """Last of all, and whole; then the memo by which other runs find it."""
        finite = replace(result, metrics=keep_finite(result.metrics))
        write_atomic(self.output / contract.RESULT_FILE, encode(finite))
        write_atomic(self._memo, encode({"output": self.relative_path(self.output)}))


def _read_result(output: Path) -> Result | None:
    path = output / contract.RESULT_FILE
    return decode(Result, path.read_bytes()) if path.exists() else None
