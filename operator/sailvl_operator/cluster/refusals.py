"""Refusals of the API server: why the objects of an attempt can't be created, as the Stuck condition shows it.

The controller writes them, and removes them when all writes of a reconcile have succeeded.
"""

from __future__ import annotations

from collections.abc import Mapping

from sailvl_operator.cluster.runs import RunKey
from sailvl_operator.core.observe import AttemptKey
from sailvl_operator.errors import OperatorError


class RefusalLog:
    """Messages of the newest refusals by run and attempt."""

    def __init__(self) -> None:
        self._messages: dict[RunKey, dict[AttemptKey, str]] = {}

    def get(self, key: RunKey) -> Mapping[AttemptKey, str]:
        """Return the refusals of each attempt of a run."""
        return self._messages.get(key, {})

    def replace(self, key: RunKey, errors: Mapping[AttemptKey, OperatorError]) -> None:
        """Store the refusals of a reconcile in place of earlier ones."""
        self._messages[key] = {attempt: str(error) for attempt, error in errors.items()}

    def clear(self, key: RunKey) -> None:
        """Remove the refusals of a run."""
        self._messages.pop(key, None)
