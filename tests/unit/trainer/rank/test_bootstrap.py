"""A rank's first code, before its heavy imports."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_rank_whose_parent_is_dead_exits_at_once() -> None:
    command = [sys.executable, "-m", "sailvl_trainer.rank.bootstrap", "999999999", "nowhere", "nothing"]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == 128 + signal.SIGKILL
