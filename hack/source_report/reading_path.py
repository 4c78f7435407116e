"""Trace one reconcile and count how often its reader changes between modules.

The *reading path* of a call is the sequence of modules of the functions that it calls, in the order of their first
calls: a reader who follows the code opens each function once. The path *enters* a module when it comes from another
one, and *returns* to a module that it has left before. Functions of `PACKAGES` alone are on the path; comprehensions
and lambdas belong to the function around them. What `PLANNING` calls is left out, since the controller plans a run
once for each spec and passes the plan on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType

PACKAGES = ("sailvl_operator.core", "sailvl_operator.api")
RECONCILE = ("sailvl_operator.core.reconcile", "reconcile")
PLANNING = ("sailvl_operator.core.plan", "plan")
FIRST_CALLS = 120
"""Python calls, those of libraries included, in the first part of a reconcile that is counted apart."""

Call = tuple[str, str]
"""Module and function name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingPath:
    """Figures of a reading path."""

    functions: int
    modules: int
    returns: int


@dataclass(slots=True)
class Tracer:
    """A profile function that records the Python calls inside of RECONCILE."""

    calls: list[Call] = field(default_factory=list)
    stack: list[FrameType] = field(default_factory=list)
    """The frame of RECONCILE while it runs, then that of PLANNING."""

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Record a call, as sys.setprofile asks."""
        call = (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
        if event == "return" and self.stack and frame is self.stack[-1]:
            self.stack.pop()
        elif event == "call" and call == (PLANNING if self.stack else RECONCILE):
            self.calls += [] if self.stack else [call]
            self.stack.append(frame)
        elif event == "call" and len(self.stack) == 1:
            self.calls.append(call)


def trace(scenario: Callable[[], object]) -> list[Call]:
    """Run a scenario that reconciles once and return the calls of the reconcile, RECONCILE itself first."""
    tracer = Tracer()
    sys.setprofile(tracer)
    try:
        scenario()
    finally:
        sys.setprofile(None)
    if not tracer.calls:
        raise ValueError(f"the scenario never called {'.'.join(RECONCILE)}; update RECONCILE or the scenario")
    return tracer.calls


def measure_path(calls: Iterable[Call]) -> ReadingPath:
    """Count the functions, the modules and the returns of the reading path of some calls."""
    functions = dict.fromkeys(call for call in calls if call[0].startswith(PACKAGES) and not call[1].startswith("<"))
    modules: set[str] = set()
    current, returns = "", 0
    for module, _ in functions:
        if module != current:
            returns += module in modules
            modules.add(module)
            current = module
    return ReadingPath(functions=len(functions), modules=len(modules), returns=returns)
