"""The in-memory API server behaves as the real one where tests of the operator rely on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.apiserver.merge_patch import apply_merge_patch
from tests.support.apiserver.requests import InMemoryApiServer
from tests.support.apiserver.store import ObjectWrite
from tests.support.apiserver.watches import Watch

PODS = "/api/v1/namespaces/team/pods"


class CollectingWatch(Watch):
    """A watch that keeps the events for its client."""

    def __init__(self, api: InMemoryApiServer, since: int, **query: str) -> None:
        super().__init__(api, "pods", {"resourceVersion": str(since), **query})
        self.events: list[tuple[str, str]] = []
        self.open()

    def queue_line(self, line: bytes) -> None:
        event = json.loads(line)
        self.events.append((event["type"], event["object"].get("metadata", {}).get("name", "")))


def build_pod(name: str, phase: str = "Running", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "team", "labels": labels},
        "spec": {"nodeName": "node-0"},
        "status": {"phase": phase},
    }


def send(api: InMemoryApiServer, method: str, path: str, body: Any = None, **query: str) -> tuple[int, dict[str, Any]]:
    """Send a request and return status and body of its response."""
    response = api.handle(method, path, query, body, by="test")
    return response.status, json.loads(response.body)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        pytest.param({"a": "b"}, {"a": "c"}, {"a": "c"}, id="replace"),
        pytest.param({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}, id="add"),
        pytest.param({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}, id="remove"),
        pytest.param({"a": ["b"]}, {"a": "c"}, {"a": "c"}, id="list becomes a string"),
        pytest.param({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}, id="nested"),
        pytest.param({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}, id="list replaces a list"),
        pytest.param(["a", "b"], ["c", "d"], ["c", "d"], id="no object"),
        pytest.param({"e": None}, {"a": 1}, {"e": None, "a": 1}, id="null in the target stays"),
        pytest.param({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}, id="null in a new object is dropped"),
    ],
)
def test_merge_patch_of_rfc_7396(target, patch, result):
    assert apply_merge_patch(target, patch) == result


def test_created_object_has_uid_generation_and_version():
    api = InMemoryApiServer()
    _, pod = send(api, "POST", PODS, {"metadata": {"generateName": "p-"}})
    metadata = pod["metadata"]
    assert metadata["name"].startswith("p-")
    assert (metadata["uid"], metadata["generation"]) == ("pod-1", 1)
    assert metadata["creationTimestamp"] == "2026-01-01T00:00:00Z"
    assert send(api, "POST", PODS, {"metadata": {"name": metadata["name"]}})[0] == 409


def test_spec_patch_increments_generation_and_keeps_status():
    api = InMemoryApiServer()
    before = api.put("pods", build_pod("p"))["metadata"]
    _, pod = send(api, "PATCH", f"{PODS}/p", {"spec": {"nodeName": None}, "status": {"phase": "Failed"}})
    assert (pod["spec"], pod["status"], pod["metadata"]["generation"]) == ({}, {"phase": "Running"}, 2)
    assert pod["metadata"]["uid"] == before["uid"]


def test_status_patch_changes_status_alone():
    api = InMemoryApiServer()
    api.put("pods", build_pod("p"))
    _, pod = send(api, "PATCH", f"{PODS}/p/status", {"spec": {"nodeName": "x"}, "status": {"phase": "Failed"}})
    assert (pod["spec"], pod["status"]) == ({"nodeName": "node-0"}, {"phase": "Failed"})
    assert pod["metadata"]["generation"] == 1


def test_patch_without_a_difference_writes_nothing():
    api = InMemoryApiServer()
    api.put("pods", build_pod("p"))
    version = api.version
    assert send(api, "PATCH", f"{PODS}/p", {"spec": {"nodeName": "node-0"}})[0] == 200
    assert api.version == version


@pytest.mark.parametrize("name", ["uid", "resourceVersion"])
def test_unmet_precondition_is_a_conflict(name):
    api = InMemoryApiServer()
    metadata = api.put("pods", build_pod("p"))["metadata"]
    assert send(api, "PATCH", f"{PODS}/p", {"metadata": {name: "other"}})[0] == 409
    assert send(api, "DELETE", f"{PODS}/p", {"preconditions": {name: "other"}})[0] == 409
    assert send(api, "DELETE", f"{PODS}/p", {"preconditions": {name: metadata[name]}})[0] == 200


def test_pages_show_the_objects_of_the_first_page_until_compaction():
    api = InMemoryApiServer()
    for name in "abc":
        api.put("pods", build_pod(name))
    _, first = send(api, "GET", PODS, limit="2")
    version, token = first["metadata"]["resourceVersion"], first["metadata"]["continue"]
    api.put("pods", build_pod("d"))
    _, second = send(api, "GET", PODS, limit="2", **{"continue": token})
    assert [o["metadata"]["name"] for o in first["items"] + second["items"]] == ["a", "b", "c"]
    assert second["metadata"] == {"resourceVersion": version}
    api.compact()
    assert send(api, "GET", PODS, limit="2", **{"continue": token})[0] == 410


def test_running_pod_is_marked_until_its_kubelet_removes_it():
    api = InMemoryApiServer(has_kubelets=True)
    writes: list[ObjectWrite] = []
    api.observers.append(writes.append)
    api.put("pods", build_pod("running"))
    api.put("pods", build_pod("failed", phase="Failed"))
    send(api, "DELETE", PODS, {"gracePeriodSeconds": 20})
    send(api, "DELETE", f"{PODS}/running", {"gracePeriodSeconds": 30})
    [marked] = api.list_objects("pods")
    assert marked["metadata"]["deletionGracePeriodSeconds"] == 20, "a later deletion can only shorten the grace period"
    assert [w.verb for w in writes] == ["create", "create", "delete", "remove"]


def test_watch_receives_selected_events_since_its_version():
    api = InMemoryApiServer()
    since = int(api.put("pods", build_pod("old", app="x"))["metadata"]["resourceVersion"])
    api.put("pods", build_pod("new", app="x"))
    watch = CollectingWatch(api, since, labelSelector="app=x")
    api.put("pods", build_pod("other", app="y"))
    api.put("pods", build_pod("new", phase="Failed", app="x"))
    api.remove("pods", api.objects["pods"]["team", "new"])
    watch.close()
    api.put("pods", build_pod("late", app="x"))
    assert watch.events == [("ADDED", "new"), ("MODIFIED", "new"), ("DELETED", "new")]


def test_watch_from_compacted_version_expires():
    api = InMemoryApiServer()
    since = int(api.put("pods", build_pod("p"))["metadata"]["resourceVersion"])
    api.put("pods", build_pod("q"))
    api.compact()
    assert CollectingWatch(api, since).events == [("ERROR", "")]
    assert CollectingWatch(api, api.version).events == []
