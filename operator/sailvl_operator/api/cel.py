"""The schema's CEL rules in this process, for `validation.py`; a server's Kubernetes functions are not all here."""

from __future__ import annotations

from functools import cache
from typing import Any

import celpy

from sailvl_operator.api.rules import OFFLINE

_INDEX = "x_index"
"""The place of a list's item, which CEL in Python can't ask for."""


def is_about_change(rule: str) -> bool:
    """It compares with what the server holds, so it can't be told from a file."""
    return "oldSelf" in rule


def holds(rule: str, value: Any) -> bool:
    """Whether a value keeps a rule."""
    return bool(_evaluate(rule, value))


def say(expression: str, value: Any) -> str:
    """What a messageExpression says of a value."""
    return str(_evaluate(expression, value))


def _evaluate(expression: str, value: Any) -> Any:
    numbered = value
    if isinstance(value, list):
        numbered = [item | {_INDEX: i} if isinstance(item, dict) else item for i, item in enumerate(value)]
    return _program(OFFLINE.get(expression, expression)).evaluate({"self": celpy.json_to_cel(numbered)})


@cache
def _environment() -> celpy.Environment:
    return celpy.Environment()


@cache
def _program(expression: str) -> celpy.Runner:
    return _environment().program(_environment().compile(expression))
