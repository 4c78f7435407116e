"""Entry point of a worker's container: `python -m sailvl_trainer`, configured by the variables in `contract.Env`.

The processes of a worker start in this order:

    sailvl_trainer.__main__          PID 1; handles SIGTERM before anything is imported
    sailvl_trainer.worker.main       the worker: SIGTERM, watchdog, HTTP server, exit code
    sailvl_trainer.worker.agent      torch's elastic agent; starts one process per rank
    sailvl_trainer.rank.bootstrap    a rank's first code, before its heavy imports
    sailvl_trainer.rank.main         the rank: process group, telemetry, exit code
    sailvl_trainer.<kind>.stage      the stage's work: curate, train or evaluate
"""

import os
import signal

from sailvl_trainer.contract import ExitCode

if __name__ == "__main__":
    # Set before the imports below, because PID 1 has no default action for SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.PREEMPTED))
    from sailvl_trainer.worker.main import main

    main()
