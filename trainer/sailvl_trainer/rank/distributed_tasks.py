"""A pool of tasks that the ranks of a stage process together; used by curation, and to count tokens for training.

Ranks claim the tasks one by one from a counter in the process group's store, so that faster ranks process more.
The output of a task must be atomic: after an interruption, a new attempt repeats the tasks without output only. A task
that may take longer than some seconds calls `report_activity` all along, which ends it if a stop is requested.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
ACTIVITY_SECONDS = 0.5
"""Minimum time between two heartbeats of a task, each of which also asks the store whether any rank is stopping."""
STOP_MESSAGE = "stopped on request; completed tasks are kept"


class TaskInterrupted(Exception):  # noqa: N818  # a stop on request is no error
    """A task ends without its output because a stop was requested; the pool raises Preempted for it on every rank."""


class TaskPool:
    """All ranks of the stage. COLLECTIVE: every rank creates the pool and calls its methods in the same order."""

    def __init__(self, context: Context) -> None:
        self._context = context
        group = dist.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self._prefix = broadcast_value(str, f"tasks/{uuid.uuid4().hex}" if context.is_first else None)
        """Prefix of the pool's keys in the store, which outlives the pool."""
        self._has_heartbeat_thread = False
        self._reported_at = 0.0

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
        ranks is reported as progress. Raises Preempted if a stop is requested, once the tasks in progress are finished
        or have been interrupted.
        """
        store = self._context.store
        with self._activity(name), suppress(TaskInterrupted):
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

        `name`: activity in the telemetry. Raises Preempted if a stop was requested before the task, or interrupted it.
        """
        self._raise_if_stop_requested()
        is_finished = False
        if self._context.is_first:
            with self._activity(name), self._send_heartbeats(), suppress(TaskInterrupted):
                task()
                is_finished = True
        self.wait()
        if not broadcast_value(bool, is_finished if self._context.is_first else None):
            raise Preempted(STOP_MESSAGE)

    def report_activity(self) -> None:
        """Send a heartbeat from within a task; called for each record or chunk, most calls do nothing.

        Raises TaskInterrupted, which the task lets pass, if a stop was requested.
        """
        now = time.monotonic()
        if now - self._reported_at < ACTIVITY_SECONDS:
            return
        self._reported_at = now
        if not self._has_heartbeat_thread:
            self._context.telemetry.update()
        if self._is_stopping():
            raise TaskInterrupted

    def wait(self) -> None:
        """Wait until all ranks call this; the heartbeat continues, because a rank that waits is not stalled.

        A stop request is announced to the ranks that are still at work.
        """
        is_announced = False
        with self._activity("waiting"):
            barrier = dist.barrier(group=self._group, async_op=True)
            assert barrier is not None, "every rank is a member of the group"
            pause = 0.001
            while not barrier.is_completed():
                self._context.telemetry.update()
                if not is_announced and self._context.preemption.is_requested_locally:
                    is_announced = self._is_stopping()
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
            raise Preempted(STOP_MESSAGE)

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
        self._has_heartbeat_thread = True
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._has_heartbeat_thread = False
