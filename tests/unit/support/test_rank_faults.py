"""The points at which ranks meet a fault name functions that exist; the slow tests that inject them run less often."""

from __future__ import annotations

import pytest

from tests.support.rank_faults import POINTS


@pytest.mark.parametrize("point", POINTS)
def test_point_of_a_fault_names_an_existing_function(point: str) -> None:
    owner, name, _, _ = POINTS[point]
    assert callable(getattr(owner, name))
