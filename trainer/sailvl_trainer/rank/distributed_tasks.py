"""A pool of tasks that the ranks of a stage process together; used by curation, and to count tokens for training.

Ranks claim the tasks one by one from a counter in the process group's store, so that faster ranks process more.
The output of a task must be atomic: after an interruption, a new attempt repeats the tasks without output only.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist

from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank.collectives import broadcast_value
from sailvl_trainer.rank.context import Context

BARRIER_TIMEOUT = timedelta(days=30)
"""Time for which a rank waits for the others. It is long because the first rank may search duplicates for hours; the
connections of a rank that dies break at once, whatever the timeout."""
MAX_POLL_SECONDS = 0.2
HEARTBEAT_SECONDS = 2.0


class TaskPool:
    """All ranks of the stage. COLLECTIVE: every rank creates the pool and calls its methods in the same order."""

    def __init__(self, context: Context) -> None:
        self._context = context
        group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self._prefix = broadcast_value(str, f"tasks/{uuid.uuid4().hex}" if context.is_first else None)
        """Prefix of the pool's keys in the store, which outlives the pool."""

    def run(
        self,
        name: str,
        count: int,
        is_done: Callable[[int], bool],
        run_task: Callable[[int], None],
        count_samples: Callable[[int], int] | None = None,
    ) -> None:
        """Run the tasks 0 … count - 1 that are not done, each on one rank, and wait until all ranks have finished.

        `name`: activity in the telemetry. `count_samples`: number of samples in a task; if given, their sum over all
        ranks is reported as progress. Raises Preempted if a stop is requested, once the tasks in progress are finished.
        """
        store = self._context.store
        with self._activity(name):
            while not self._is_stopping() and (task := store.add(f"{self._prefix}/{name}", 1) - 1) < count:
                if not is_done(task):
                    run_task(task)
                if count_samples is not None:
                    store.add(f"{self._prefix}/{name}/samples", count_samples(task))
                self._report_progress(name, has_samples=count_samples is not None)
        self.wait()
        self._report_progress(name, has_samples=count_samples is not None)
        self._raise_if_stop_requested()

    def run_on_first_rank(self, name: str, task: Callable[[], None]) -> None:
        """Run a task on the first rank while the others wait for its end.

        `name`: activity in the telemetry. Raises Preempted if a stop was requested before the task.
        """
        self._raise_if_stop_requested()
        if self._context.is_first:
            with self._activity(name), self._send_heartbeats():
                task()
        self.wait()

    def wait(self) -> None:
        """Wait until all ranks call this; the heartbeat continues, because a rank that waits is not stalled."""
        with self._activity("waiting"):
            barrier = dist.barrier(group=self._group, async_op=True)
            assert barrier is not None, "every rank is a member of the group"
            pause = 0.001
            while not barrier.is_completed():
                self._context.telemetry.update()
                time.sleep(pause)
                pause = min(MAX_POLL_SECONDS, 2 * pause)
            barrier.wait()

    def _activity(self, name: str) -> AbstractContextManager[None]:
        """Record a block's time as an activity; before the stage runs, it is already recorded as `starting`."""
        telemetry = self._context.telemetry
        return nullcontext() if telemetry.progress.phase == "starting" else telemetry.activity(name)

    def _is_stopping(self) -> bool:
        """Whether a stop of any rank is known to this one; ranks announce a stop in the store."""
        key = f"{self._prefix}/stop"
        if self._context.preemption.is_requested_locally:
            self._context.store.add(key, 1)
        return self._context.store.add(key, 0) > 0

    def _raise_if_stop_requested(self) -> None:
        if self._context.preemption.should_stop():
            raise Preempted("stopped on request; completed tasks are kept")

    def _report_progress(self, name: str, *, has_samples: bool) -> None:
        """Send a heartbeat, with the samples of all ranks if they are counted."""
        if not has_samples:
            self._context.telemetry.update()
            return
        samples = self._context.store.add(f"{self._prefix}/{name}/samples", 0)
        self._context.telemetry.update(step=samples, samples=samples)

    @contextmanager
    def _send_heartbeats(self) -> Iterator[None]:
        """Send heartbeats from a thread, because a query over all rows is a single call that may take long."""
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                self._context.telemetry.update()

        thread = threading.Thread(target=send, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
