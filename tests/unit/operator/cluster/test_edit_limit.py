"""Edits of specs beyond the limit of a namespace wait, and are parsed together."""

from __future__ import annotations

from typing import Any

import pytest

from sailvl_operator.api.parse import MAX_SPEC_BYTES
from sailvl_operator.cluster.edit_limit import _MAX_NAMESPACES, BYTES_PER_SECOND, EditLimit
from sailvl_operator.cluster.runs import RunStore
from tests.unit.operator.cluster.test_runs import KEY, build_raw


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def build_edited(number: int) -> dict[str, Any]:
    """Build a run with a spec of 66 KiB that was edited some number of times."""
    env = [{"name": f"V{n}", "value": "v" * 1024} for n in range(64)]
    raw = build_raw(10 + number, workers={"env": env})
    raw["metadata"]["generation"] = 1 + number
    return raw


def test_edits_in_a_loop_are_parsed_at_a_limited_rate(clock: Clock) -> None:
    store, reads = RunStore(EditLimit(clock)), []
    for number in range(1000):
        store.put(build_edited(number))
        if not store.get_wait_seconds(KEY):
            reads.append(clock.now)
            store.get(KEY)
        clock.now += 0.01
    limited = [time for time in reads if time > clock.now - 5]
    assert 0 < len(limited) * 64 * 1024 < 5 * BYTES_PER_SECOND
    assert store.get_wait_seconds(KEY) < 1, "one run never waits long, however often it is edited"


def test_new_runs_and_own_status_writes_do_not_count(clock: Clock) -> None:
    store = RunStore(EditLimit(clock))
    for number in range(400):
        raw = build_edited(0)
        raw["metadata"] |= {"name": f"r{number}"}
        for status in ({}, {"observedGeneration": 1}):
            raw["metadata"]["resourceVersion"] += "0"
            store.put(raw | {"status": status})
            assert store.get_wait_seconds(("team", f"r{number}")) == 0
            store.get(("team", f"r{number}"))


def test_edits_of_finished_runs_count(clock: Clock) -> None:
    store = RunStore(EditLimit(clock))
    status = {"conditions": [{"type": "Succeeded", "status": "True"}]}
    for number in range(400):
        store.put(build_edited(number) | {"status": status})
        store.get(KEY)
    assert store.get_wait_seconds(KEY) == 0, "the newest edit has been read"
    store.put(build_edited(400) | {"status": status})
    assert store.get_wait_seconds(KEY) > 1


def test_edits_of_one_namespace_delay_no_other(clock: Clock) -> None:
    limit = EditLimit(clock)
    for _ in range(100):
        limit.count_edit("hostile", MAX_SPEC_BYTES)
    assert limit.get_wait_seconds("hostile") > 1
    assert limit.get_wait_seconds("good") == 0
    clock.now += 60
    assert limit.get_wait_seconds("hostile") == 0


def test_namespaces_without_recent_edits_are_forgotten(clock: Clock) -> None:
    limit = EditLimit(clock)
    for number in range(10 * _MAX_NAMESPACES):
        limit.count_edit(f"n{number}", 1)
        clock.now += 1
    assert len(limit._paid_at) <= _MAX_NAMESPACES
