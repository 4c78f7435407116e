"""Store of runs: order of versions, and runs that can't be parsed."""

from __future__ import annotations

from sailvl_operator.cluster.runs import RunStore
from tests.support.builders.operator import build_document

KEY = ("team", "demo")


def build_raw(version: int, uid: str = "u", **spec: object) -> dict:
    metadata = {"uid": uid, "resourceVersion": str(version), "creationTimestamp": "2026-01-01T00:00:00Z"}
    document = build_document(**spec)
    return document | {"metadata": document["metadata"] | metadata}


def test_older_version_never_replaces_newer_one():
    runs = RunStore()
    assert runs.put(build_raw(10))
    assert not runs.put(build_raw(9))
    assert not runs.put(build_raw(10))
    assert runs.put(build_raw(11))
    runs.delete(KEY, "another")
    assert runs.get(KEY).run.resource_version == "11"
    runs.delete(KEY, "u")
    assert not runs.put_patched(build_raw(12)), "the run was deleted before the response arrived"
    assert runs.get(KEY) is None


def test_run_with_invalid_spec_keeps_its_identity_and_the_error():
    runs = RunStore()
    runs.put(build_raw(10, stages="none"))
    entry = runs.get(KEY)
    assert (entry.run.name, entry.run.uid, bool(entry.problem)) == ("demo", "u", True)
