"""A rank's first code, before its heavy imports: it dies with its worker and can print its stacks.

The worker's agent starts it as `python -m sailvl_trainer.rank.bootstrap PARENT STACKS MODULE`; it then runs MODULE,
which is `sailvl_trainer.rank.main` except in tests, as the rank's main module.
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
"""Signal at which a rank writes the stacks of its threads to its file in STACKS."""
PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""


def main(arguments: list[str]) -> None:
    """Prepare the process and run `arguments[2]` as its main module."""
    parent, stacks, module = arguments
    die_with_parent(int(parent))
    # One file per rank, which the worker reads: in a shared log the stacks of several ranks would mix.
    stack_file = (Path(stacks) / f"{os.getpid()}.txt").open("w")
    faulthandler.enable(stack_file)
    faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
    sys.argv = [module]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:  # noqa: BLE001  # a failed import; the module itself reports all later errors
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}"
        rank = int(os.environ.get("RANK", "0"))
        exit_rank(Termination(exit_code=1, rank=rank, message=message, traceback=text))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends; exit if it has ended already.

    Each rank leads its own session, so that nothing else ends it when a worker outside a container is killed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
