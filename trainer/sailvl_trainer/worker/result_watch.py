"""Ends a worker whose stage's result is there already, before it has met the others.

Each worker looks for itself: results never change, so all decide alike. One that sees the storage late meets nobody,
and goes on looking until it sees the result too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sailvl_trainer.contract import Result
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.ranks import Ranks

LOOK_SECONDS = 5.0


def watch_for_result(files: StageFiles, ranks: Ranks, on_found: Callable[[Result], None]) -> None:
    """Look in a thread until the ranks begin; from then on it is theirs to look, together."""

    def watch() -> None:
        while not ranks.has_begun.wait(LOOK_SECONDS):
            found = files.find_result()
            if found is not None and not ranks.has_begun.is_set():
                on_found(found)

    threading.Thread(target=watch, name="memo", daemon=True).start()
