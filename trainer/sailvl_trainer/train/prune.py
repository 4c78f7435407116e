"""Which checkpoints stay: the newest few on the chain of attempts, and nothing else.

Called after each save, and at an attempt's start, which frees what a failed save has left.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sailvl_trainer.contract import MANIFEST_FILE
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.storage.lineage import find_newest_attempt, iter_checkpoints


def prune(files: StageFiles, attempt: int, keep: int) -> list[Path]:
    """Remove what no resume needs, of this attempt and of those before it; what was removed.

    Manifests go first, so no half folder looks whole. An attempt that is cut off removes nothing: a later one may have
    started from what it would remove. One that comes later finds the newest, which always stays.
    """
    if find_newest_attempt(files) > attempt:
        return []
    kept = {files.storage / checkpoint.path for checkpoint in list(iter_checkpoints(files, attempt))[: max(1, keep)]}
    folders = (f for n in range(1, attempt + 1) for f in files.checkpoint_dir(n, 0).parent.glob("step-*"))
    removed = [folder for folder in folders if folder not in kept]
    for folder in removed:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return removed
