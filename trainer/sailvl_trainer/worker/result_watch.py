"""Watch for the stage's result while a worker waits for its peers, because they may have found it and exited.

Every worker checks for itself whether the stage has a result; results never change, so all of them decide alike. A
worker that sees the shared storage late finds no peers, and keeps checking until it sees the result too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sailvl_trainer.contract import Result
from sailvl_trainer.storage.layout import StageFiles
from sailvl_trainer.worker.ranks import RankProcesses

POLL_INTERVAL_SECONDS = 5.0


def watch_for_result(files: StageFiles, ranks: RankProcesses, on_found: Callable[[Result], None]) -> None:
    """Call `on_found` from a thread once there is a result, unless the ranks start before; they check it themselves."""

    def watch() -> None:
        while not ranks.have_started.wait(POLL_INTERVAL_SECONDS):
            found = files.find_result()
            if found is not None and not ranks.have_started.is_set():
                on_found(found)

    threading.Thread(target=watch, name="result-watch", daemon=True).start()
