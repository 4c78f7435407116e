"""What can go wrong between an operator and its API server, and how often; drawn here, done by `faulty_proxy.py`.

The n-th request of a kind to a path has the same fate whatever happens at the same time, so a seed can be repeated.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, fields

HAPPENS_TO = {
    "conflict": "write",
    "error_after": "write",
    "reset_after": "write",
    "gone": "watch page",
    "hanging": "watch",
    "cut": "watch",
    "error_event": "watch",
    "truncated": "list page read write",
    "too_many": "list page read write watch",
    "error": "list page read write watch",
    "reset_before": "list page read write watch",
    "slow": "list page read write watch",
}
"""Kinds of requests; a page is a list that goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """The chance of each fault, of one request of a kind that it may happen to; those of one kind are at most 1."""

    conflict: float = 0.0
    """409; nothing was done."""
    error_after: float = 0.0
    """504, as when etcd is slow: it was done all the same."""
    reset_after: float = 0.0
    """It was done, and the answer is lost."""
    gone: float = 0.0
    """410: as an answer, or as the watch's first event."""
    hanging: float = 0.0
    """The watch stays open, and nothing comes any more."""
    cut: float = 0.0
    """The watch ends in the middle of a line, as if that were its end or by a reset."""
    error_event: float = 0.0
    """The watch's server tells of a trouble of its own: 500 as an event."""
    truncated: float = 0.0
    """The first half of the answer, as if it were whole."""
    too_many: float = 0.0
    """429 with Retry-After."""
    error: float = 0.0
    """500 or 503; nothing was done."""
    reset_before: float = 0.0
    """The connection is reset; nothing was done."""
    slow: float = 0.0
    """Done and answered, after some seconds."""
    slow_seconds: float = 2.0
    """At most."""


def every_fault(chance: float) -> Faults:
    """Each of them as often."""
    return Faults(**{f.name: chance for f in fields(Faults) if f.name in HAPPENS_TO})


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """Something that was done to a request."""

    seconds: float
    """Since the proxy began."""
    fault: str
    namespace: str
    request: str

    def __str__(self) -> str:
        return f"{self.seconds:7.2f} {self.fault:12} {self.request}"


class Dice:
    """Draws, and keeps the list of what came."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.faults = Faults()
        """Wherever `faults_in` says nothing else."""
        self.faults_in: dict[str, Faults] = {}
        """By namespace."""
        self.injected: list[Injection] = []
        self._began = time.monotonic()
        self._ordinals: Counter[str] = Counter()

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def draw(self, kind: str, method: str, path: str, query: str) -> tuple[str, random.Random]:
        """The fault of this request, empty for none, and what to draw its details from."""
        namespace, rest = _split(path)
        like = f"{kind} {method} {rest}"
        self._ordinals[like] += 1
        chances = random.Random(f"{self.seed}/{like}/{self._ordinals[like]}")
        drawn, faults = chances.random(), self.faults_in.get(namespace, self.faults)
        for fault in (name for name, kinds in HAPPENS_TO.items() if kind in kinds.split()):
            drawn -= getattr(faults, fault)
            if drawn < 0:
                self._note(fault, namespace, f"{method} {path}{'?' if query else ''}{query}")
                return fault, chances
        return "", chances

    def _note(self, fault: str, namespace: str, request: str) -> None:
        injection = Injection(seconds=self.seconds(), fault=fault, namespace=namespace, request=request)
        self.injected.append(injection)

    def count(self) -> Counter[str]:
        """How often each fault came."""
        return Counter(injection.fault for injection in self.injected)

    def describe(self, last: int = 60) -> str:
        """For the message of a test that fails."""
        lines = [str(injection) for injection in self.injected[-last:]]
        return "\n".join([f"seed {self.seed}, {len(self.injected)} faults, the last:", *lines])


def _split(path: str) -> tuple[str, str]:
    """The namespace, whose name tests draw, and the path without it."""
    before, _, after = path.partition("/namespaces/")
    namespace, _, rest = after.partition("/")
    return namespace, f"{before}/{rest}" if after else path
