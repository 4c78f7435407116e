"""An object that another client wrote affects its own run alone."""

from __future__ import annotations

import asyncio
import copy
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from sailvl_operator.api import names
from sailvl_operator.api.parse import refresh_run
from sailvl_operator.api.status import decode_status, encode_status
from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.cluster.owned_objects import OwnedObjects
from sailvl_operator.cluster.recorder import Recorder, build_event
from sailvl_operator.cluster.runs import RunStore
from sailvl_operator.cluster.start_diagnostics import find_waiting
from sailvl_operator.cluster.watch_audit import WatchAuditor
from sailvl_operator.core.observe import observe
from sailvl_operator.core.reconcile import reconcile
from sailvl_operator.metrics import LOOPS, Metrics
from tests.support.builders.operator import build_document, build_job, build_run
from tests.support.controller_world import make_pod, running
from tests.support.core_world import DEFAULTS, CoreWorld, fail_attempt, run_to_active_stage
from tests.support.fuzz import fuzz

HOSTILE = [
    -1,
    0,
    2**63,
    10**400,
    1.5,
    "",
    "x" * 5000,
    "2026-13-45T99:99:99Z",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "1e999999",
    "nan",
    "\x1b[2J\u202e",
    "Failed",
    "Running",
    "Succeeded",
    None,
    True,
    [],
    {},
    [[[]]],
    {"x": -1},
]


def iterate_places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside nested JSON values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *iterate_places(inner)]]


def build_statuses() -> list[dict[str, Any]]:
    """Return the statuses of a run that starts, of one that restarts after a crash, and of one that has failed."""
    world = CoreWorld(spec={"restartPolicy": {"maxRestarts": 1}, "pricePerGpuHour": "2"})
    run_to_active_stage(world)
    statuses = [encode_status(world.status)]
    for saved in (5, 6):
        fail_attempt(world, saved=saved)
        statuses.append(encode_status(world.status))
    return statuses


STATUSES = build_statuses()
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(HOSTILE)), min_size=1, max_size=3)


@pytest.mark.fuzz
def test_changed_status_is_reconciled_or_refused_with_the_one_error():
    jobs = [build_job("curate", attempt) for attempt in (1, 2)]

    def check(example: tuple[dict[str, Any], list[tuple[int, Any]]]) -> None:
        status = copy.deepcopy(example[0])
        for number, value in example[1]:
            places = iterate_places(status)
            container, key = places[number % len(places)]
            container[key] = copy.deepcopy(value)
        with suppress(DocumentError):
            decision = reconcile(build_run(status=status), observe(jobs), now=1e9, defaults=DEFAULTS)
            if decision.status is not None:
                assert decode_status(encode_status(decision.status)) == decision.status, (
                    "the operator can read it again"
                )

    fuzz(st.tuples(st.sampled_from(STATUSES), CHANGES), check, examples=150)


@pytest.mark.fuzz
def test_any_annotation_becomes_one_clean_line():
    def check(text: str) -> None:
        raw = {"metadata": {"resourceVersion": "2", "annotations": {names.ANNOTATION_RESTART: text}}}
        run = refresh_run(build_run(), raw)
        assert run.restart_stage.isprintable()
        decision = reconcile(run, observe(), now=1e9, defaults=DEFAULTS)
        assert decision.status is not None
        assert len(decision.status.observed_restart_request) <= 64
        event = build_event(run, type_="Warning", reason="R", message=text * 100, identity="i", now=1e9)
        assert event["message"].isprintable()

    fuzz(st.text(max_size=200) | st.sampled_from(["curate\n", "\x1b[2Jcurate", "\ud800", "\u202ecurate"]), check)


async def test_status_that_cannot_be_read_costs_its_own_run_alone():
    async with running() as world:
        broken = build_document()
        broken["metadata"]["name"] = "broken"
        broken = world.api.put("sailvlruns", broken)
        broken["status"] = {"stages": "none"}
        world.send_event(world.api.put("sailvlruns", broken))
        await world.apply(build_document())
        await world.until(lambda: world.states()["curate"] == ("Starting", 1))
        await world.until(lambda: any(event["reason"] == "InvalidStatus" for event in world.api.list_objects("events")))
        [event] = [event for event in world.api.list_objects("events") if event["reason"] == "InvalidStatus"]
        assert event["involvedObject"]["name"] == "broken"
        assert event["message"].startswith("status is malformed: Expected `array`, got `str` - at `$.stages`; remove")
        assert [job.run for job, _ in find_waiting(world.owned_objects, world.runs)] == ["demo"]


async def test_pod_with_a_time_that_cannot_be_read_costs_itself_alone():
    async with running() as world:
        await world.apply(build_document())
        await world.until(lambda: world.states()["curate"] == ("Starting", 1))
        broken = make_pod("other", 1, 0, "Running", job_uid="other")
        broken["metadata"]["name"] = "broken"
        placed = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "0000-01-01T00:00:00Z"}
        broken["status"]["conditions"] = [placed]
        world.api.put("pods", broken)
        await world.add_pods("curate")
        await world.until(lambda: world.states()["curate"] == ("Running", 1))


@pytest.mark.parametrize("field", ["reason", "message", "series", "lastTimestamp"])
@pytest.mark.parametrize("value", [None, 5, [], {"x": []}, "\x1b[2J" * 1000], ids=lambda value: type(value).__name__)
async def test_event_with_any_value_is_ignored_or_cleaned(field, value, caplog):
    async with running() as world:
        await world.apply(build_document())
        await world.until(lambda: world.states()["curate"] == ("Starting", 1))
        about = {"type": "Warning", "involvedObject": {"uid": world.api.list_objects("jobs")[0]["metadata"]["uid"]}}
        event = {"metadata": {"name": "e"}, "reason": "FailedCreate", "message": "quota", **about, field: value}
        world.api.put("events", event)
        await world.diagnostics.diagnose_waiting()
        await world.until_idle()
        assert "internal error" not in caplog.text
        assert world.status.condition("Stuck").message.isprintable()
        assert len(world.status.condition("Stuck").message) <= 1024


def test_run_whose_spec_cannot_be_planned_is_stored_with_the_problem(monkeypatch):
    def fail(_: object) -> None:
        raise RecursionError("deep")

    monkeypatch.setattr("sailvl_operator.cluster.runs.plan", fail)
    runs, document = RunStore(), build_document()
    document["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    runs.put(document)
    entry = runs.get(("team", "demo"))
    assert entry is not None
    assert entry.problem == "the spec can't be read: nested too deeply"


async def test_audit_replays_other_events_if_one_cannot_be_handled():
    counted, handled = [], []

    def handle(type_: str, raw: dict[str, Any]) -> None:
        if raw["metadata"]["name"] == "a":
            raise RecursionError
        handled.append(raw["metadata"]["name"])

    async def get(_resource: object, namespace: str, name: str, **_: object) -> dict[str, Any]:
        return {"metadata": {"namespace": namespace, "name": name, "resourceVersion": "1"}}

    async def list_pages(*_: object, **__: object) -> Any:
        yield SimpleNamespace(items=[await get(None, "team", name) for name in "ab"])

    client = SimpleNamespace(get=get, list_pages=list_pages)
    auditor = WatchAuditor(
        client,  # type: ignore[arg-type]
        RunStore(),
        namespaces=(),
        interval_seconds=60,
        on_event=handle,
        count=lambda: None,
        count_error=counted.append,
    )
    await auditor.check_once()
    await auditor.check_once()
    assert (handled, counted) == (["b"], ["watch-audit"])


async def test_recorder_posts_other_events_if_one_fails_unexpectedly():
    counted, posted = [], []

    async def create(_resource: object, _namespace: str, event: dict[str, Any], **_: object) -> None:
        if event["message"] == "first":
            raise RecursionError
        posted.append(event["message"])

    recorder = Recorder(
        SimpleNamespace(create=create),  # type: ignore[arg-type]
        identity="i",
        enabled=True,
        count=lambda _: None,
        clock=lambda: 1e9,
        count_error=counted.append,
    )
    task = asyncio.create_task(recorder.run())
    for message in ("first", "second"):
        recorder.record(build_run(), type_="Normal", reason="R", message=message)
    async with asyncio.timeout(5):
        while not posted:
            await asyncio.sleep(0.01)
    task.cancel()
    assert (posted, counted) == (["second"], ["recorder"])


def test_every_loop_of_the_metric_is_named_by_the_informers():
    owned_objects = OwnedObjects(
        SimpleNamespace(),  # type: ignore[arg-type]
        namespaces=(),
        on_change=lambda _: None,
        count_restart=lambda *_: None,
    )
    informers = {f"informer-{resource}" for resource, _ in owned_objects.ages()}
    assert informers == {loop for loop in LOOPS if loop.startswith("informer-")}
    Metrics(CollectorRegistry()).count_loop_error("progress")
