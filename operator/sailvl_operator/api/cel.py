"""Evaluates the CEL rules of the schema with celpy, for `validation.py`.

celpy lacks two-variable comprehensions and some functions that Kubernetes adds; `rules.OFFLINE` has replacements.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import celpy

from sailvl_operator.api.rules import OFFLINE

_INDEX = "x_index"
"""Field with the index of a list item, added because celpy has no two-variable comprehensions."""


def is_transition_rule(rule: str) -> bool:
    """Whether a rule compares with the stored object, so that it can't be evaluated for a file."""
    return "oldSelf" in rule


def evaluate_rule(rule: str, value: Any) -> bool:
    """Whether a value satisfies a rule."""
    return bool(_evaluate(rule, value))


def evaluate_message(expression: str, value: Any) -> str:
    """Return the message that a messageExpression produces for a value."""
    return str(_evaluate(expression, value))


def _evaluate(expression: str, value: Any) -> Any:
    indexed = value
    if isinstance(value, list):
        indexed = [item | {_INDEX: i} if isinstance(item, dict) else item for i, item in enumerate(value)]
    return _program(OFFLINE.get(expression, expression)).evaluate({"self": celpy.json_to_cel(indexed)})


@cache
def _environment() -> celpy.Environment:
    return celpy.Environment()


@cache
def _program(expression: str) -> celpy.Runner:
    return _environment().program(_environment().compile(expression))
