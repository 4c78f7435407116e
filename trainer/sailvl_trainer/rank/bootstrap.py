"""What a rank does before its heavy imports: it can't outlive its worker, and shows its stacks when asked.

`python -m sailvl_trainer.rank.bootstrap PARENT STACKS MODULE`, started by the worker's agent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from sailvl_trainer.contract import Termination
from sailvl_trainer.rank.termination import exit_rank

STACK_SIGNAL = signal.SIGUSR1
PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""


def main(arguments: list[str]) -> None:
    """Be the rank whose main is `arguments[2]`."""
    parent, stacks, module = arguments
    die_with(int(parent))
    stack = (Path(stacks) / f"{os.getpid()}.txt").open("w")
    faulthandler.enable(stack)  # a file each, else they mix in the log; the worker reads it
    faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
    sys.argv = [module]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:  # noqa: BLE001  # an import that fails; a rank's main says for itself what it raises
        traceback.print_exc()
        words = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}"
        rank = int(os.environ.get("RANK", "0"))
        exit_rank(Termination(exit_code=1, rank=rank, message=message, traceback=words))


def die_with(parent: int) -> None:
    """SIGKILL for this process when its parent's starting thread ends; at once, if it has ended already.

    Ranks lead sessions of their own, so nothing else takes them along when a worker is killed outside a container.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
