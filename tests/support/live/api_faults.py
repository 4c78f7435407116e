"""Faults between an operator and its API server: their kinds and probabilities; `proxy.py` injects them.

The fault of the n-th request of a kind to a path does not depend on other requests, so a seed can be repeated.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, fields

REQUEST_KINDS = {
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
"""Kinds of requests that each fault applies to; a page is a request that continues a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRates:
    """The probability of each fault for a request of a kind that it applies to; per kind they add up to at most 1."""

    conflict: float = 0.0
    """409; the request is not executed."""
    error_after: float = 0.0
    """504, as with a slow etcd; the request is executed."""
    reset_after: float = 0.0
    """The connection is reset after the request was executed."""
    gone: float = 0.0
    """410, as the response or as the first event of a watch."""
    hanging: float = 0.0
    """The watch stays open without further events."""
    cut: float = 0.0
    """The watch ends within a line, with or without a reset of the connection."""
    error_event: float = 0.0
    """The watch delivers a 500 as an event."""
    truncated: float = 0.0
    """The response has only the first half of its body."""
    too_many: float = 0.0
    """429 with Retry-After."""
    error: float = 0.0
    """503; the request is not executed."""
    reset_before: float = 0.0
    """The connection is reset before the request is executed."""
    slow: float = 0.0
    """The request is executed after some seconds."""
    slow_seconds: float = 2.0
    """Maximum delay of a slow request."""


def build_uniform_rates(rate: float) -> FaultRates:
    """Return the same rate for each fault."""
    return FaultRates(**{f.name: rate for f in fields(FaultRates) if f.name in REQUEST_KINDS})


@dataclass(frozen=True, kw_only=True, slots=True)
class InjectedFault:
    """A fault that was injected into a request."""

    seconds: float
    """Time since the proxy was started."""
    fault: str
    namespace: str
    request: str

    def __str__(self) -> str:
        return f"{self.seconds:7.2f} {self.fault:12} {self.request}"


class FaultSchedule:
    """Draws the fault of each request and records the faults that were injected."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rates = FaultRates()
        """Rates in all namespaces that `rates_in` does not name."""
        self.rates_in: dict[str, FaultRates] = {}
        """Rates by namespace."""
        self.injected: list[InjectedFault] = []
        self._started_at = time.monotonic()
        self._ordinals: Counter[str] = Counter()

    def seconds(self) -> float:
        """Return the time since the start."""
        return time.monotonic() - self._started_at

    def draw(self, kind: str, method: str, path: str, query: str) -> tuple[str, random.Random]:
        """Return the fault of a request, or an empty string for none, and the generator to draw its details from."""
        namespace, rest = _split(path)
        key = f"{kind} {method} {rest}"
        self._ordinals[key] += 1
        rng = random.Random(f"{self.seed}/{key}/{self._ordinals[key]}")
        drawn, rates = rng.random(), self.rates_in.get(namespace, self.rates)
        for fault in (name for name, kinds in REQUEST_KINDS.items() if kind in kinds.split()):
            drawn -= getattr(rates, fault)
            if drawn < 0:
                self._record(fault, namespace, f"{method} {path}{'?' if query else ''}{query}")
                return fault, rng
        return "", rng

    def _record(self, fault: str, namespace: str, request: str) -> None:
        injected = InjectedFault(seconds=self.seconds(), fault=fault, namespace=namespace, request=request)
        self.injected.append(injected)

    def count(self) -> Counter[str]:
        """Return how often each fault was injected."""
        return Counter(injected.fault for injected in self.injected)

    def describe(self, last: int = 60) -> str:
        """Return the last injected faults, for the message of a failing test."""
        lines = [str(injected) for injected in self.injected[-last:]]
        return "\n".join([f"seed {self.seed}, {len(self.injected)} faults, the last:", *lines])


def _split(path: str) -> tuple[str, str]:
    """Return the namespace, whose name tests draw, and the path without it."""
    before, _, after = path.partition("/namespaces/")
    namespace, _, rest = after.partition("/")
    return namespace, f"{before}/{rest}" if after else path
