"""What people do to runs, on a real cluster: suspend, bound their time, clean up, edit, append, start again, raise
gates, delete what is a run's own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sailvl_operator.cluster.resources import EVENTS, JOBS, PODS, SERVICES, Resource
from sailvl_operator.core.units import parse_time
from tests.support.live.api import CLAIMS, Api, Object, Refused, until
from tests.support.live.replicas import Replica
from tests.support.live.stub_runs import Place, Run, build_image, build_stage, open_operator, open_place

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def place(cluster: Any, kubeconfig: str, resource: None) -> Iterator[Place]:
    if not cluster.is_ours:
        pytest.skip("the test reads the workers' storage: it needs the cluster of `make cluster`")
    image = build_image(cluster.registry)
    with Api(kubeconfig) as api, open_place(api, image, prefix="lifecycle") as place:
        yield place


@pytest.fixture(scope="module", autouse=True)
def operator(place: Place, kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with open_operator(kubeconfig, [place], tmp_path_factory.mktemp("operator")) as operator:
        yield operator


def list_words(*words: str, attempt: int = 1, nodes: int = 2) -> list[str]:
    """Of a journal, sorted: each worker's."""
    return sorted(f"draw-a {attempt} {index} {word}" for word in words for index in range(nodes))


def count_restarts(run: Run) -> tuple[Object, Object]:
    """By cause: all, and those that count against the budgets."""
    return run.stage().get("restarts", {}), run.stage().get("countedRestarts", {})


def test_suspended_workers_save_and_the_next_attempt_goes_on(place):
    run = Run(place, "paused", "slow", nodes=2)
    run.until_at("Running")
    run.edit(suspend=True)
    until(lambda: run.condition("Running") == ("False", "Suspended", "the workers save a checkpoint"))
    run.until_true("Suspended")
    assert sorted(run.journal) == list_words("began", "told", "saved")
    assert run.at() == ("Suspended", 1)
    until(lambda: run.children(PODS) == [])
    run.edit(suspend=False)
    run.until_at("Running", 2)
    assert not run.is_true("Suspended")
    assert run.jobs == ["paused-draw-a-2"]
    assert count_restarts(run) == ({}, {})
    assert "lost" not in run.status["goodput"]["seconds"]
    run.delete()


def test_a_run_that_is_created_suspended_waits_to_be_let_go(place):
    run = Run(place, "asleep", "succeed", suspend=True)
    run.until_true("Suspended")
    assert (run.count_children(), run.at()) == (0, ("Pending", 0))
    run.edit(suspend=False)
    run.until_true("Succeeded")
    assert run.at() == ("Succeeded", 1)


def test_a_deadline_ends_the_run_and_a_later_one_lets_it_go_on(place):
    run = Run(place, "bounded", "slow", nodes=2)
    run.until_at("Running")
    limit = int(time.time() - parse_time(run.status["startTime"])) + 4
    run.edit(activeDeadlineSeconds=limit)
    assert run.until_true("Failed") == "DeadlineExceeded"
    assert run.condition("Failed")[2] == "the run was active for activeDeadlineSeconds; raise them to go on"
    ledger = run.status["goodput"]["seconds"]
    assert limit <= sum(ledger.values()) - ledger.get("queued", 0) <= limit + 2
    until(lambda: run.jobs == [] and run.children(PODS) == [], told=run.describe)
    assert sorted(run.journal) == list_words("began", "told", "saved")
    run.edit(activeDeadlineSeconds=600)
    run.until_at("Running", 2)
    assert not run.is_true("Failed")
    assert count_restarts(run) == ({}, {})
    run.delete()


def test_neighbours_of_a_stage_that_stops_the_run_save(place):
    gate = {"metric": "score", "atLeast": "0.9"}
    neighbour = build_stage("draw-b", dependsOn=[], workers=Run.env("slow"))
    run = Run(place, "neighbours", "until", stages=[DRAW_A | {"gate": gate}, neighbour])
    for index in (0, 1):
        run.until_at("Running", index=index)
    run.release("draw-a")
    assert run.until_true("Failed") == "GateFailed"
    until(lambda: run.journal[-2:] == ["draw-b 1 0 told", "draw-b 1 0 saved"], told=run.describe)
    until(lambda: run.jobs == ["neighbours-draw-a-1"])
    run.edit(stages=[DRAW_A | {"gate": gate | {"atLeast": "0"}}, neighbour | {"workers": Run.env("until")}])
    run.release("draw-b")
    run.until_true("Succeeded")
    assert (run.at(0), run.at(1)) == (("Succeeded", 1), ("Succeeded", 2))


def create_with_claim(place: Place, name: str, when_deleted: str) -> Run:
    template = {"storageClassName": "static", "resources": {"requests": {"storage": "1Gi"}}}
    storage = {"volumeClaimTemplate": template, "whenDeleted": when_deleted}
    return Run(place, name, "succeed", storage=storage, ttlSecondsAfterFinished=3)


def test_a_finished_run_goes_after_its_time_and_its_claim_stays_or_goes(place):
    names = {"kept": "Retain", "dropped": "Delete"}
    for name in names:
        place.add_volume(f"{place.namespace}-{name}", f"{name}-storage")
    runs = {name: create_with_claim(place, name, when_deleted) for name, when_deleted in names.items()}
    finished: dict[str, str] = {}

    def look() -> bool:
        finished.update({n: run.status["completionTime"] for n, run in runs.items() if run.is_true("Succeeded")})
        return len(finished) == len(runs)

    until(look)
    for name, run in runs.items():
        until(lambda run=run: not run.raw)
        assert time.time() - parse_time(finished[name]) >= 3
        until(lambda run=run: run.count_children() == 0)

    def find_claim(name: str) -> str:
        found = place.api.get(CLAIMS, f"{name}-storage", place.namespace)
        return "" if found is None else found["metadata"]["uid"]

    until(lambda: not find_claim("dropped"))
    kept = find_claim("kept")
    assert kept
    heir = create_with_claim(place, "kept", "Retain")
    heir.until_true("Succeeded")
    assert find_claim("kept") == kept
    assert heir.uid != runs["kept"].uid
    journal = (place.storage / "kept-storage" / "kept.journal").read_text().splitlines()
    assert journal == ["draw-a 1 0 began", "draw-a 1 0 done"] * 2


def test_a_deleted_run_s_workers_save_and_everything_goes(place, operator):
    run = Run(place, "deleted", "slow", nodes=2)
    run.until_at("Running")
    run.delete()
    until(lambda: run.count_children() == 0)
    assert sorted(run.journal) == list_words("began", "told", "saved")
    assert run.raw == {}
    series = f'sailvl_run_stage_attempt{{namespace="{place.namespace}",run="deleted"'
    until(lambda: operator.metric(series) == 0)


@pytest.fixture(scope="module")
def edited(place: Place, operator: Replica) -> Iterator[Run]:
    """Its first stage runs, its second has yet to begin."""
    run = Run(place, "edited", "hold", stages=2)
    run.until_at("Running")
    run.pods = [pod["metadata"]["uid"] for pod in run.children(PODS)]
    yield run
    run.delete()


OTHER = {"curate": {"sources": [{"format": "procedural", "samples": 9}]}}
DRAW_A, DRAW_B = build_stage("draw-a"), build_stage("draw-b")
IMMUTABLE = "stage draw-a: stages are immutable once started; append a new stage"
EDITS = [
    pytest.param({"stages": [DRAW_A | OTHER, DRAW_B]}, IMMUTABLE, id="a started stage"),
    pytest.param(
        {"stages": [DRAW_A | {"name": "other"}, DRAW_B]}, "stages can't be removed, renamed or reordered", id="its name"
    ),
    pytest.param({"stages": [DRAW_B, DRAW_A]}, "stages can't be removed, renamed or reordered", id="the order"),
    pytest.param(
        {"stages": [DRAW_A]},
        "stages can't be removed, renamed or reordered; append new stages at the end",
        id="less stages",
    ),
    pytest.param({"model": {"preset": "sail-vl-2b"}}, "model is immutable once a stage has started", id="the model"),
    pytest.param({"storage": {"volumeClaim": "x"}}, "storage is immutable once a stage has started", id="the storage"),
    pytest.param({"seed": 1}, "seed is immutable once a stage has started; create a new run", id="the seed"),
    pytest.param({"stages": [DRAW_A, DRAW_B | OTHER]}, "", id="a stage that has not begun"),
    pytest.param({"stages": [DRAW_A, DRAW_B | OTHER, build_stage("draw-c")]}, "", id="a stage is appended"),
    pytest.param(
        {"stages": [DRAW_A | {"gate": {"metric": "score", "atLeast": "0"}}, DRAW_B | OTHER, build_stage("draw-c")]},
        "",
        id="a gate",
    ),
    pytest.param({"workers": {"nodes": 2}}, "", id="the workers"),
    pytest.param({"image": "localhost:5000/other:1"}, "", id="the image"),
    pytest.param({"restartPolicy": {"maxRestarts": 3}}, "", id="the budgets"),
    pytest.param({"activeDeadlineSeconds": 3600}, "", id="the deadline"),
]


@pytest.mark.parametrize(("spec", "words"), EDITS)
def test_what_may_be_edited_while_a_stage_runs(spec: Object, words: str, edited: Run) -> None:
    if words:
        with pytest.raises(Refused) as refusal:
            edited.edit(**spec)
        assert words in str(refusal.value)
        return
    edited.edit(**spec)
    generation = edited.raw["metadata"]["generation"]
    until(lambda: edited.status.get("observedGeneration") == generation)
    assert edited.at() == ("Running", 1)
    assert [pod["metadata"]["uid"] for pod in edited.children(PODS)] == edited.pods


def test_changed_workers_are_the_next_attempt_s(place):
    run = Run(place, "moved", "hold")
    run.until_at("Running")
    run.edit(workers={"nodes": 2} | Run.env("succeed"))
    run.api.delete(PODS, run.children(PODS)[0]["metadata"]["name"], place.namespace)
    run.until_true("Succeeded")
    assert sorted(run.journal[-4:]) == list_words("began", "done", attempt=2)


def test_stages_appended_to_a_run_that_is_over(place):
    run = Run(place, "longer", "succeed")
    run.until_true("Succeeded")
    before = run.stage()
    run.edit(stages=[DRAW_A, DRAW_B])
    until(lambda: not run.is_true("Succeeded"))
    run.until_true("Succeeded")
    assert (run.stage(), run.at(1)) == (before, ("Succeeded", 1))
    assert run.journal == [f"{stage} 1 0 {word}" for stage in ("draw-a", "draw-b") for word in ("began", "done")]


def test_a_person_starts_stages_again(place):
    hung, failed, over = (Run(place, f"again-{stub}", stub) for stub in ("hold", "config", "succeed"))
    hung.until_at("Running")
    hung.ask("draw-a")
    failed.until_true("Failed")
    failed.edit(workers=Run.env("succeed"))
    failed.ask("draw-a")
    over.until_true("Succeeded")
    over.ask("draw-a")
    hung.until_at("Running", 2)
    failed.until_true("Succeeded")
    assert (hung.jobs, failed.at(), over.at()) == (["again-hold-draw-a-2"], ("Succeeded", 2), ("Succeeded", 1))
    assert [count_restarts(run) for run in (hung, failed, over)] == [({}, {})] * 3
    assert not failed.is_true("Failed")
    hung.ask("nonsense")
    until(lambda: find_words(hung, "RestartRequested", "there is no stage 'nonsense'; stages are draw-a"))
    until(lambda: find_words(over, "RestartRequested", "stage draw-a has its result"))
    assert over.journal == ["draw-a 1 0 began", "draw-a 1 0 done"]
    hung.edit(suspend=True)
    hung.until_true("Suspended")
    hung.ask("draw-a")
    until(lambda: find_words(hung, "RestartRequested", "set spec.suspend to false, and it goes on"))
    assert hung.at() == ("Suspended", 2)
    hung.delete()


def find_words(run: Run, reason: str, words: str) -> bool:
    events = run.api.list(EVENTS, run.place.namespace, fields=f"involvedObject.uid={run.uid},reason={reason}")
    return any(words in event["message"] for event in events)


def gated(at_least: str, on_fail: str) -> list[Object]:
    return [DRAW_A | {"gate": {"metric": "score", "atLeast": at_least, "onFail": on_fail}}, DRAW_B]


def test_gates_stop_pause_or_let_go_on_and_open_when_raised(place):
    stopped, paused, warned = (
        Run(place, f"gate-{on_fail.lower()}", "succeed", stages=gated("0.9", on_fail))
        for on_fail in ("Stop", "Pause", "Continue")
    )
    wanted = "stage draw-a: score is 0.5; its gate wants at least 0.9"
    assert stopped.until_true("Failed") == "GateFailed"
    assert stopped.condition("Failed")[2] == wanted
    assert paused.until_true("Stuck") == "GateNotPassed"
    assert warned.until_true("Succeeded") == "Completed"
    assert warned.condition("GatesPassed") == ("False", "GateFailed", wanted)
    for run, on_fail in ((stopped, "Stop"), (paused, "Pause")):
        assert (run.at(0), run.at(1)) == (("Succeeded", 1), ("Pending", 0))
        run.edit(stages=gated("0.4", on_fail))
    for run in (stopped, paused):
        run.until_true("Succeeded")
        assert run.condition("GatesPassed")[:2] == ("True", "GatePassed")
        assert (run.is_true("Failed"), run.is_true("Stuck")) == (False, False)
        assert run.journal == warned.journal


def pause(run: Run) -> None:
    run.edit(suspend=True)
    run.until_true("Suspended")


def go_on(run: Run) -> None:
    run.edit(suspend=False)


def run_on(run: Run) -> None:
    run.until_at("Running")


def end_first(run: Run) -> None:
    run.release("draw-a")
    run.until_at("Running", index=1)


def wait_for_room(run: Run) -> None:
    run.until_true("Stuck")


def leave(run: Run) -> None:
    """Nothing is done afterwards."""


CROWDED = {"resources": {"requests": {"cpu": "1000"}}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """Somebody deletes a child of a run."""

    name: str
    """Of the run."""
    kind: Resource
    when: Callable[[Run], None]
    """Brings the run to where the child is deleted."""
    then: Callable[[Run], None] = leave
    at: tuple[str, int]
    """State and attempt of the first stage afterwards."""
    restarts: Object = field(default_factory=dict)
    jobs: tuple[str, ...]
    """Those that are left, without the run's name."""


SAVED = {"Preempted": 1}
"""As by an eviction: told to stop, the workers saved."""
ENDED = ("draw-a-1", "draw-b-1")
REMOVALS = [
    Removal(name="job", kind=JOBS, when=run_on, at=("Running", 2), restarts=SAVED, jobs=("draw-a-2",)),
    Removal(name="pod", kind=PODS, when=run_on, at=("Running", 2), restarts=SAVED, jobs=("draw-a-2",)),
    Removal(name="service", kind=SERVICES, when=run_on, at=("Running", 1), jobs=("draw-a-1",)),
    Removal(name="paused-job", kind=JOBS, when=pause, then=go_on, at=("Running", 2), jobs=("draw-a-2",)),
    Removal(name="paused-service", kind=SERVICES, when=pause, then=go_on, at=("Running", 2), jobs=("draw-a-2",)),
    Removal(name="ended-job", kind=JOBS, when=end_first, at=("Succeeded", 1), jobs=ENDED[1:]),
    Removal(name="ended-pod", kind=PODS, when=end_first, at=("Succeeded", 1), jobs=ENDED),
    Removal(
        name="new-job",
        kind=JOBS,
        when=wait_for_room,
        at=("Restarting", 2),
        restarts={"Infra": 1},
        jobs=("draw-a-2",),
    ),
]


@pytest.fixture(scope="module")
def held(place: Place, operator: Replica) -> Iterator[dict[str, Run]]:
    """A run for each, started together."""
    runs = {}
    for case in REMOVALS:
        workers = CROWDED if case.when is wait_for_room else None
        stages = 2 if case.when is end_first else 1
        runs[case.name] = Run(place, case.name, "until", nodes=2, stages=stages, workers=workers)
    yield runs
    for run in runs.values():
        run.delete()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in REMOVALS])
def test_what_people_delete_is_made_up_for(case: Removal, held: dict[str, Run]) -> None:
    run = held[case.name]
    case.when(run)
    victim = next(child["metadata"] for child in run.children(case.kind) if "draw-b" not in child["metadata"]["name"])
    run.api.delete(case.kind, victim["name"], run.place.namespace)
    until(lambda: victim["uid"] not in [child["metadata"]["uid"] for child in run.children(case.kind)])
    case.then(run)
    until(lambda: (run.at(), run.jobs) == (case.at, [f"{run.name}-{job}" for job in case.jobs]), told=run.describe)
    until(lambda: len(run.children(SERVICES)) == 1)
    time.sleep(2)  # whatever it should not do, it would have begun by now
    assert (run.at(), count_restarts(run)[0]) == (case.at, case.restarts)
    assert run.jobs == [f"{run.name}-{job}" for job in case.jobs]


def test_what_is_over_stays_so_when_its_children_go_and_the_operator_starts_again(place, operator):
    done, failed = Run(place, "latched", "succeed", stages=2), Run(place, "latched-wrong", "config")
    done.until_true("Succeeded")
    failed.until_true("Failed")
    until(lambda: failed.jobs == [])
    for job in done.jobs:
        place.api.delete(JOBS, job, place.namespace)
    until(lambda: done.children(JOBS) == done.children(PODS) == [])
    versions = [run.raw["metadata"]["resourceVersion"] for run in (done, failed)]
    operator.end(signal.SIGKILL)
    operator.start()
    until(lambda: operator.metric("sailvl_operator_reconciles_total") >= 2)
    time.sleep(2)
    assert [run.raw["metadata"]["resourceVersion"] for run in (done, failed)] == versions
    assert (done.jobs, failed.jobs) == ([], [])
    assert done.journal == [f"{stage} 1 0 {word}" for stage in ("draw-a", "draw-b") for word in ("began", "done")]
