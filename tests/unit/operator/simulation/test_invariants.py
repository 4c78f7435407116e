"""Each law of a status can be broken, and says so; a good change breaks none."""

from __future__ import annotations

import msgspec
import pytest

from sailvl_operator.api.status import Condition, Goodput, LastFailure, StageStatus, Status
from tests.support.builders.operator import build_document
from tests.support.simulation.invariants import STATUS_LAWS
from tests.support.simulation.status_invariants import BrokenLawError

NAMES = [stage["name"] for stage in build_document()["spec"]["stages"]]
RUN = build_document(restartPolicy={"maxRestarts": 2}) | {"metadata": {"generation": 1, "annotations": {}}}
BEGUN, LATER = "2026-01-01T00:00:00.000Z", "2026-01-01T00:01:00.000Z"


def build_conditions(true: str = "", reason: str = "Running") -> list[Condition]:
    return [
        Condition(
            type=type_,
            status="True" if type_ == true else "False",
            reason=reason,
            message="",
            last_transition_time=BEGUN,
            observed_generation=1,
        )
        for type_ in ("Succeeded", "Failed", "Running", "Suspended", "Stuck")
    ]


def build_status(true: str = "Running", reason: str = "Running", **first: object) -> Status:
    """One whose first stage runs, unless `first` says otherwise."""
    known = {"state": "Running", "attempt": 2, "digest": "d", "start_time": BEGUN, "restarts": {"Crash": 1}}
    stages = [StageStatus(name=NAMES[0], **(known | {"counted_restarts": {"Crash": 1}} | first))]
    return Status(
        observed_generation=1,
        start_time=BEGUN,
        completion_time=LATER if true in ("Succeeded", "Failed") else "",
        conditions=build_conditions(true, reason),
        stages=stages + [StageStatus(name=name, state="Pending") for name in NAMES[1:]],
        goodput=Goodput(settled_at=BEGUN),
    )


def change(status: Status, **fields: object) -> Status:
    return msgspec.structs.replace(status, **fields)


OLD = build_status()
SETTLED = Goodput(settled_at=LATER, seconds={"training": 60})
FAILED = LastFailure(cause="Crash", attempt=2, time=LATER)
BROKEN = [
    ("stages are kept in order", OLD, change(OLD, stages=OLD.stages[::-1])),
    ("stages are kept in order", OLD, change(OLD, stages=OLD.stages[:2])),
    ("attempts never go down", OLD, build_status(attempt=1)),
    ("attempts never go down", OLD, build_status(state="Restarting", attempt=4)),
    ("states follow each other", OLD, build_status(state="Starting")),
    ("states follow each other", OLD, build_status(attempt=3)),
    ("restarts never go down", OLD, build_status(restarts={})),
    ("restarts stay in their budgets", OLD, build_status(counted_restarts={"Crash": 3})),
    ("a stage fails only beyond its budget", OLD, build_status(state="Failed", last_failure=FAILED)),
    ("what succeeded stays", build_status(state="Succeeded"), build_status(state="Succeeded", output="other")),
    ("a started stage keeps its digest", OLD, build_status(digest="e")),
    ("an ended run stays ended", build_status("Failed", "StageFailed"), OLD),
    ("an ended run stays ended", build_status("Succeeded"), change(OLD, completion_time="")),
    ("conditions are well formed", OLD, change(OLD, conditions=OLD.conditions[1:])),
    ("conditions are well formed", OLD, change(OLD, conditions=[*OLD.conditions, OLD.conditions[0]])),
    (
        "conditions are well formed",
        OLD,
        change(OLD, conditions=[msgspec.structs.replace(c, last_transition_time=LATER) for c in OLD.conditions]),
    ),
    ("the status is of this generation", OLD, change(OLD, observed_generation=0)),
    ("every second is counted once", OLD, change(OLD, goodput=Goodput(settled_at=LATER, seconds={"training": 59}))),
    ("every second is counted once", change(OLD, goodput=SETTLED), OLD),
    ("times are set once", OLD, change(OLD, start_time=LATER)),
    ("times are set once", OLD, change(OLD, completion_time=LATER)),
]


def find_broken(old: Status, new: Status) -> set[str]:
    found = set()
    for law in STATUS_LAWS:
        try:
            law(RUN, old, new)
        except BrokenLawError:
            found.add(law.__name__.replace("_", " "))
    return found


@pytest.mark.parametrize(("law", "old", "new"), BROKEN, ids=[f"{i} {law}" for i, (law, *_) in enumerate(BROKEN)])
def test_a_broken_law_says_so(law, old, new):
    assert law in find_broken(old, new)


def test_every_law_of_a_status_is_broken_here():
    assert {law.__name__.replace("_", " ") for law in STATUS_LAWS} == {law for law, *_ in BROKEN}


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(change(OLD, goodput=SETTLED), id="time passes"),
        pytest.param(
            change(build_status(state="Restarting", attempt=3, counted_restarts={"Crash": 2}, restarts={"Crash": 2})),
            id="again",
        ),
        pytest.param(
            change(
                build_status(
                    "Failed", "StageFailed", state="Failed", counted_restarts={"Crash": 2}, last_failure=FAILED
                )
            ),
            id="it fails beyond its budget",
        ),
    ],
)
def test_a_good_change_breaks_none(new):
    moved = [
        msgspec.structs.replace(c, last_transition_time=o.last_transition_time)
        for c, o in zip(new.conditions, OLD.conditions, strict=True)
    ]
    assert find_broken(OLD, change(new, conditions=moved)) == set()
