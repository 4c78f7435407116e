"""JSON merge patches of the status."""

from __future__ import annotations

import pytest

from sailvl_operator.cluster.merge_patch import build_merge_patch, drop_nulls

OLD = {"a": 1, "b": {"c": 2, "d": 3}, "list": [{"x": 1}]}


@pytest.mark.parametrize(
    ("new", "patch"),
    [
        pytest.param(OLD, {}, id="nothing changed"),
        pytest.param({"a": 1, "b": {"c": 2, "d": 3}}, {"list": None}, id="removed field"),
        pytest.param(OLD | {"b": {"c": 2}}, {"b": {"d": None}}, id="removed nested field"),
        pytest.param(OLD | {"b": {"c": 5, "d": 3}}, {"b": {"c": 5}}, id="changed nested field"),
        pytest.param(OLD | {"list": [{"x": 2}]}, {"list": [{"x": 2}]}, id="changed list is replaced"),
        pytest.param(OLD | {"n": {}}, {"n": {}}, id="new empty field"),
    ],
)
def test_patch_holds_changed_fields_only(new, patch):
    assert build_merge_patch(OLD, new) == patch


def test_nulls_are_dropped_at_every_depth():
    assert drop_nulls({"a": None, "b": [{"c": None, "d": 0}], "e": {"f": None}}) == {"b": [{"d": 0}], "e": {}}
