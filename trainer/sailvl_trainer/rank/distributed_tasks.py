"""Units of work dealt to the ranks as they come for more, and waiting for each other; used by all passes of curation.

A unit's output appears whole or not at all, so a run that is killed does only those units again that were open.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from sailvl_trainer.errors import Preempted
from sailvl_trainer.rank.context import Context

PATIENCE = timedelta(days=30)
"""Of a rank that waits for the others: the first may look for duplicates for hours. A rank that dies breaks its
connections at once, whatever the patience."""
POLL_SECONDS = 0.2
BEAT_SECONDS = 2.0
STOP_KEY = "curate/stop"


class Crew:
    """All ranks of the stage at work together. COLLECTIVE: every rank makes one and makes the same calls."""

    def __init__(self, context: Context) -> None:
        self._context = context
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self._group = group

    def share(
        self,
        name: str,
        units: int,
        is_done: Callable[[int], bool],
        do: Callable[[int], None],
        samples: Callable[[int], int] | None = None,
    ) -> None:
        """Carry out units 0 … units - 1 over all ranks, each by one, and wait for the last.

        `samples`: how many a unit holds; they are told as progress, summed over all ranks. Raises Preempted when a stop
        is asked for, once the units in hand are done.
        """
        telemetry, store = self._context.telemetry, self._context.store
        with telemetry.activity(name):
            while not self._is_stopping() and (unit := store.add(f"curate/{name}", 1) - 1) < units:
                if not is_done(unit):
                    do(unit)
                if samples is not None:
                    store.add(f"curate/{name}/samples", samples(unit))
                self._tell(name, samples is not None)
        self.wait()
        self._tell(name, samples is not None)
        self._stop_if_asked()

    @contextmanager
    def first_alone(self, name: str) -> Iterator[bool]:
        """A block whose work the first rank does; the others wait at its end. Yields whether this rank is the one.

        Raises Preempted, before the block, when a stop is asked for.
        """
        self._stop_if_asked()
        if self._context.is_first:
            with self._context.telemetry.activity(name), self._beating():
                yield True
        else:
            yield False
        self.wait()

    def wait(self) -> None:
        """Until every rank is here; the heartbeat goes on, as waiting is no stall of this rank's."""
        with self._context.telemetry.activity("waiting"):
            barrier = dist.barrier(group=self._group, async_op=True)
            assert barrier is not None, "every rank is in the group"
            pause = 0.001
            while not barrier.is_completed():
                self._context.telemetry.update()
                time.sleep(pause)
                pause = min(POLL_SECONDS, 2 * pause)
            barrier.wait()

    def _is_stopping(self) -> bool:
        """Whether any rank was asked to stop, as far as this one knows; the others hear of it by the store."""
        if self._context.preemption.is_requested_locally:
            self._context.store.add(STOP_KEY, 1)
        return self._context.store.add(STOP_KEY, 0) > 0

    def _stop_if_asked(self) -> None:
        if self._context.preemption.should_stop():
            raise Preempted("stopped on request while curating; what is done stays done")

    def _tell(self, name: str, is_counted: bool) -> None:
        """The heartbeat, with the progress of all ranks."""
        if not is_counted:
            self._context.telemetry.update()
            return
        done = self._context.store.add(f"curate/{name}/samples", 0)
        self._context.telemetry.update(step=done, samples=done)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """A heartbeat from a thread: a query over all rows is one call that may take long."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT_SECONDS):
                self._context.telemetry.update()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
