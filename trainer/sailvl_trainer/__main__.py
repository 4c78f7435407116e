"""`python -m sailvl_trainer`: a worker, by its environment (contract.Env)."""

import os
import signal

from sailvl_trainer.contract import ExitCode

if __name__ == "__main__":
    # before all else: PID 1 has no default action for SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.PREEMPTED))
    from sailvl_trainer.worker.main import main

    main()
