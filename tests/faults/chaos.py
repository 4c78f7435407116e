"""Chaos on the real cluster, drawn from a seed: strikes at any moment, in bursts, one before another is over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.faults.scene import Scene
from tests.faults.strikes import STRIKES, MissedError, Strike, Undo

BURST_CHANCE, BURST_GAP = 0.25, (0.0, 4.0)
GAP = (12.0, 55.0)
"""Seconds between strikes: often long enough to come further, often not."""
LOOK_SECONDS = 0.1
UNDO_SECONDS = 90.0
"""For which the taking back of a strike is tried: it may need what another one took."""
POLICY = {"maxRestarts": 1000, "maxInfraRestarts": 10000, "maxFailuresPerNode": 0, "stallTimeoutSeconds": 30}
"""No budget ends these runs, and none of the two nodes is left alone."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blow:
    """A strike that was done."""

    at: float
    """Unix seconds."""
    words: str
    what: str
    until: float
    """Unix seconds at which it was taken back; `at`: it is never."""


@dataclass(kw_only=True)
class Chaos:
    """One seed's, over as many runs as there is time for."""

    seed: int
    log: Log
    blows: list[Blow] = field(default_factory=list)
    missed: int = 0
    _pending: list[tuple[float, Strike, Undo]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def rage(self, scene: Scene, until: float) -> None:
        """Strike at a run until a time (monotonic seconds) or its end, then take everything back."""
        following = time.monotonic() + self._draw_gap()
        try:
            while time.monotonic() < until and not is_over(scene):
                self._take_back(due_only=True)
                if time.monotonic() >= following:
                    self._strike(scene)
                    following = time.monotonic() + self._draw_gap()
                time.sleep(LOOK_SECONDS)
        finally:
            self._take_back(due_only=False)

    def _draw_gap(self) -> float:
        return self._chance.uniform(*(BURST_GAP if self._chance.random() < BURST_CHANCE else GAP))

    def _strike(self, scene: Scene) -> None:
        busy = {strike.alone for _, strike, _ in self._pending}
        open_now = [(strike, often) for strike, often in STRIKES if not strike.alone or strike.alone not in busy]
        [strike] = self._chance.choices(*zip(*open_now, strict=True))
        lasts, now = self._chance.uniform(*strike.lasts), time.time()
        try:
            hit = strike.do(scene, self._chance)
        except (MissedError, LookupError, StopIteration, OSError, *scene.api.ERRORS) as error:
            self.missed += 1
            self.log(f"  missed: {strike.words}: {error!r}"[:200])
            return
        if hit.undo is not None:
            self._pending.append((time.monotonic() + lasts, strike, hit.undo))
        words = f" for {lasts:.1f} s" if hit.undo is not None else ""
        self.log(f"  {strike.words}: {hit.what}{words}; {describe(scene)}")
        self.blows.append(Blow(at=now, words=strike.words, what=hit.what, until=now + lasts))

    def _take_back(self, *, due_only: bool) -> None:
        """In the order in which they were done."""
        now = time.monotonic()
        for entry in [e for e in self._pending if not due_only or e[0] <= now]:
            self._pending.remove(entry)
            self._try(entry[1], entry[2])

    def _try(self, strike: Strike, undo: Undo) -> None:
        until = time.monotonic() + UNDO_SECONDS
        while True:
            try:
                undo()
                return
            except (MissedError, AssertionError) as error:
                if time.monotonic() > until:
                    raise
                self.log(f"  not yet taken back: {strike.words}: {error}"[:200])
                self._take_back(due_only=True)
                time.sleep(1)


def is_over(scene: Scene) -> bool:
    return bool(scene.recorder.condition("Succeeded") or scene.recorder.condition("Failed"))


def describe(scene: Scene) -> str:
    """Where the run stands."""
    now = scene.recorder.now
    return "not begun" if now is None else f"{now.stage} {now.attempt}, {now.state} {now.phase} {now.step}/{now.steps}"
