"""Targets of a benchmark: whether its figures meet them, the table that says so, and the exit status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Bound of one figure."""

    figure: str
    """Name of the figure."""
    description: str
    """Sentence for people that says how the figure is measured."""
    bound: float
    is_minimum: bool = False
    """Whether the figure must be at least the bound. Default: at most."""

    def is_met(self, figures: Mapping[str, float]) -> bool:
        """Return whether the figure keeps to the bound; False if it is missing or not a number."""
        value = figures.get(self.figure, nan)
        if isnan(value):
            return False
        return value >= self.bound if self.is_minimum else value <= self.bound


def find_missed(targets: Sequence[Target], figures: Mapping[str, float]) -> list[str]:
    """Return the names of the figures that miss their targets."""
    return [target.figure for target in targets if not target.is_met(figures)]


def format_targets(targets: Sequence[Target], figures: Mapping[str, float]) -> str:
    """Format one line per target: MET or MISS, the description, the figure and the bound."""
    width = max(len(target.description) for target in targets)
    return "\n".join(
        f"{'MET ' if target.is_met(figures) else 'MISS'} {target.description:<{width}} "
        f"{figures.get(target.figure, nan):>9.4g}   target {'≥' if target.is_minimum else '≤'} {target.bound:g}"
        for target in targets
    )


def describe_result(targets: Sequence[Target], figures: Mapping[str, float]) -> str | int:
    """Return the argument of `sys.exit`: 0 if all targets are met, else a message, which makes the status 1."""
    missed = find_missed(targets, figures)
    return f"{len(missed)} of {len(targets)} targets missed: {', '.join(missed)}" if missed else 0
