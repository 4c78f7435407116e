"""Store of runs: order of versions, and runs that can't be parsed."""

from __future__ import annotations

import msgspec
import pytest

from sailvl_operator.api import names
from sailvl_operator.api.parse import parse_run
from sailvl_operator.api.types import Run
from sailvl_operator.cluster.resources import SailVLRun
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
    assert runs.put(build_raw(11, suspend=True))
    runs.delete(KEY, "another")
    assert runs.get(KEY).run.resource_version == "11"
    runs.delete(KEY, "u")
    assert not runs.put_patched(build_raw(12)), "the run was deleted before the response arrived"
    assert runs.get(KEY) is None


@pytest.mark.parametrize("is_read", [False, True], ids=["not parsed", "parsed"])
@pytest.mark.parametrize("conditions", [[], [{"type": "Succeeded", "status": "True"}]], ids=["active", "finished"])
def test_change_of_other_metadata_is_a_new_version_without_a_change(is_read, conditions):
    def build(version: int, generation: int = 1, **metadata: object) -> dict:
        raw = build_raw(version, suspend=generation > 1) | {"status": {"conditions": conditions}}
        return raw | {"metadata": raw["metadata"] | {"generation": generation} | metadata}

    runs = RunStore()
    assert runs.put(build(10))
    for version, metadata in enumerate(({"labels": {"a": "b"}}, {"finalizers": ["a/b"]}, {"annotations": {"a": "b"}})):
        if is_read:
            runs.get(KEY)
        assert not runs.put(build(11 + version, **metadata))
        assert runs.get_version(KEY) == ("u", 11 + version)
    assert runs.get(KEY).run.resource_version == "13", "the version is the precondition of the next write"
    assert runs.put(build(20, annotations={names.ANNOTATION_RESTART: "sft"}))
    assert runs.put(build(21, generation=2))
    assert runs.put(build(22, generation=2, deletionTimestamp="2026-01-01T00:00:00Z"))
    assert runs.put(build(23, generation=2, uid="another"))


def test_run_with_invalid_spec_keeps_its_identity_and_the_error():
    runs = RunStore()
    runs.put(build_raw(10, stages="none"))
    entry = runs.get(KEY)
    assert (entry.run.name, entry.run.uid, bool(entry.problem)) == ("demo", "u", True)


def test_spec_is_parsed_once_for_any_number_of_changes_between_two_reads(monkeypatch):
    parsed = []

    def count(raw: dict) -> Run:
        parsed.append(raw["metadata"]["resourceVersion"])
        return parse_run(raw)

    monkeypatch.setattr("sailvl_operator.cluster.runs.parse_run", count)
    store = RunStore()
    for version in range(10, 20):
        raw = build_raw(version, seed=version)
        raw["metadata"]["generation"] = version
        store.put(raw)
    assert not parsed
    assert [store.get(KEY).run.spec.seed for _ in range(3)] == [19] * 3
    raw["metadata"]["resourceVersion"] = "30"
    store.put(raw | {"status": {"observedGeneration": 19}})
    assert store.get(KEY).run.status == {"observedGeneration": 19}
    assert parsed == ["19"]


def test_run_is_stored_from_json_as_from_a_document():
    raw = build_raw(10)
    raw["metadata"]["annotations"] = {names.ANNOTATION_RESTART: "sft", "other": "x"}
    read = RunStore()
    read.put(msgspec.json.decode(msgspec.json.encode(raw), type=SailVLRun))
    built = RunStore()
    built.put(raw)
    assert read.get(KEY) == built.get(KEY)
    assert read.get(KEY).run.restart_stage == "sft"
