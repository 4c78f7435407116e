"""A reconcile can be read without jumping between modules; how the report counts that is tested on made-up calls."""

from __future__ import annotations

import pytest

from hack.source_report.reading_path import FIRST_CALLS, PACKAGES, PLANNING, RECONCILE, ReadingPath, measure_path, trace
from hack.source_report.scenario import build_scenario

MAX_RETURNS = 9
MAX_RETURNS_IN_FIRST_CALLS = 3
"""Returns of the reading path to a module that it left before; a change may only lower these."""

CORE = PACKAGES[0]


def build_calls(*names: str) -> list[tuple[str, str]]:
    """Return calls of functions of the core from names such as `stage.step`."""
    return [(f"{CORE}.{module}", function) for module, function in (name.split(".") for name in names)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a.f"], ReadingPath(functions=1, modules=1, returns=0), id="one function"),
        pytest.param(["a.f", "a.g"], ReadingPath(functions=2, modules=1, returns=0), id="one module"),
        pytest.param(["a.f", "b.f", "c.f"], ReadingPath(functions=3, modules=3, returns=0), id="modules in a row"),
        pytest.param(["a.f", "b.f", "a.g"], ReadingPath(functions=3, modules=2, returns=1), id="back to a module"),
        pytest.param(["a.f", "b.f", "a.f"], ReadingPath(functions=2, modules=2, returns=0), id="function read before"),
        pytest.param(["a.f", "b.<listcomp>"], ReadingPath(functions=1, modules=1, returns=0), id="comprehension"),
    ],
)
def test_path_counts_modules_and_returns(names: list[str], expected: ReadingPath) -> None:
    assert measure_path(build_calls(*names)) == expected


def test_path_leaves_out_other_packages() -> None:
    calls = [*build_calls("a.f"), ("json", "loads"), *build_calls("a.g")]
    assert measure_path(calls) == ReadingPath(functions=2, modules=1, returns=0)


def test_trace_needs_a_reconcile() -> None:
    with pytest.raises(ValueError, match="never called"):
        trace(lambda: None)


def test_trace_begins_with_the_reconcile_and_leaves_planning_out() -> None:
    calls = trace(build_scenario())
    assert calls[0] == RECONCILE
    assert PLANNING not in calls[1:]
    assert calls.count(RECONCILE) == 1


def test_reconcile_returns_rarely_to_modules_it_left() -> None:
    calls = trace(build_scenario())
    assert measure_path(calls).returns <= MAX_RETURNS
    assert measure_path(calls[:FIRST_CALLS]).returns <= MAX_RETURNS_IN_FIRST_CALLS
