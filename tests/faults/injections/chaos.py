"""Random fault injection on the real cluster, drawn from a seed: at any moment, in bursts, and overlapping."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.injections.chaos_actions import CHAOS_FAULTS, ChaosFault, NoTargetError, Revert
from tests.faults.runs.experiment import Experiment

BURST_PROBABILITY, BURST_GAP_SECONDS = 0.25, (0.0, 4.0)
GAP_SECONDS = (12.0, 55.0)
"""Time between two faults: often long enough for new steps, often not."""
POLL_SECONDS = 0.1
REVERT_SECONDS = 90.0
"""Time for which reverting a fault is retried: it may need what another fault has taken away."""
POLICY = {"maxRestarts": 1000, "maxInfraRestarts": 10000, "maxFailuresPerNode": 0, "stallTimeoutSeconds": 30}
"""No restart budget ends these runs, and none of the two nodes is excluded."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosEvent:
    """A fault that was injected."""

    at: float
    """Unix time in seconds."""
    title: str
    target: str
    until: float
    """Unix time at which it was reverted; equal to `at` if it needs no reverting."""


@dataclass(kw_only=True)
class Chaos:
    """The faults of one seed, over as many runs as fit into the time."""

    seed: int
    log: Log
    events: list[ChaosEvent] = field(default_factory=list)
    skipped: int = 0
    """Faults for which there was no target."""
    _active: list[tuple[float, ChaosFault, Revert]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def inject_until(self, experiment: Experiment, until: float) -> None:
        """Inject faults into a run until a monotonic time or its end, then revert all of them."""
        next_time = time.monotonic() + self._draw_gap()
        try:
            while time.monotonic() < until and not is_finished(experiment):
                self._revert(due_only=True)
                if time.monotonic() >= next_time:
                    self._inject(experiment)
                    next_time = time.monotonic() + self._draw_gap()
                time.sleep(POLL_SECONDS)
        finally:
            self._revert(due_only=False)

    def _draw_gap(self) -> float:
        return self._rng.uniform(*(BURST_GAP_SECONDS if self._rng.random() < BURST_PROBABILITY else GAP_SECONDS))

    def _inject(self, experiment: Experiment) -> None:
        active_groups = {fault.exclusive_group for _, fault, _ in self._active}
        allowed = [
            (fault, weight) for fault, weight in CHAOS_FAULTS if fault.exclusive_group not in active_groups - {""}
        ]
        [fault] = self._rng.choices(*zip(*allowed, strict=True))
        seconds, now = self._rng.uniform(*fault.seconds), time.time()
        try:
            injected = fault.inject(experiment, self._rng)
        except (NoTargetError, LookupError, StopIteration, OSError, *experiment.api.ERRORS) as error:
            self.skipped += 1
            self.log(f"  skipped: {fault.title}: {error!r}"[:200])
            return
        if injected.revert is not None:
            self._active.append((time.monotonic() + seconds, fault, injected.revert))
        duration = f" for {seconds:.1f} s" if injected.revert is not None else ""
        self.log(f"  {fault.title}: {injected.target}{duration}; {describe_progress(experiment)}")
        self.events.append(ChaosEvent(at=now, title=fault.title, target=injected.target, until=now + seconds))

    def _revert(self, *, due_only: bool) -> None:
        """Revert active faults in the order of their injection."""
        now = time.monotonic()
        for entry in [e for e in self._active if not due_only or e[0] <= now]:
            self._active.remove(entry)
            self._retry_revert(entry[1], entry[2])

    def _retry_revert(self, fault: ChaosFault, revert: Revert) -> None:
        until = time.monotonic() + REVERT_SECONDS
        while True:
            try:
                revert()
                return
            except (NoTargetError, AssertionError) as error:
                if time.monotonic() > until:
                    raise
                self.log(f"  not reverted yet: {fault.title}: {error}"[:200])
                self._revert(due_only=True)
                time.sleep(1)


def is_finished(experiment: Experiment) -> bool:
    """Return whether the run has succeeded or failed."""
    return bool(experiment.recorder.get_true_condition("Succeeded") or experiment.recorder.get_true_condition("Failed"))


def describe_progress(experiment: Experiment) -> str:
    """Return stage, attempt and step of the run as text."""
    now = experiment.recorder.now
    return (
        "not started" if now is None else f"{now.stage} {now.attempt}, {now.state} {now.phase} {now.step}/{now.steps}"
    )
