"""Each invariant of a status detects a violation, and a valid change violates none."""

from __future__ import annotations

import msgspec
import pytest

from sailvl_operator.api.status import Condition, Goodput, LastFailure, StageStatus, Status
from tests.support.builders.operator import build_document
from tests.support.simulation.invariants import STATUS_INVARIANTS
from tests.support.simulation.status_invariants import InvariantViolation

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
    """Return the status of a run whose first stage runs; `first` replaces fields of that stage."""
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
VIOLATIONS = [
    ("stages keep their order", OLD, change(OLD, stages=OLD.stages[::-1])),
    ("stages keep their order", OLD, change(OLD, stages=OLD.stages[:2])),
    ("attempts never decrease", OLD, build_status(attempt=1)),
    ("attempts never decrease", OLD, build_status(state="Restarting", attempt=4)),
    ("state transitions are valid", OLD, build_status(state="Starting")),
    ("state transitions are valid", OLD, build_status(attempt=3)),
    ("restarts never decrease", OLD, build_status(restarts={})),
    ("restarts stay within budget", OLD, build_status(counted_restarts={"Crash": 3})),
    ("stage fails only after its budget", OLD, build_status(state="Failed", last_failure=FAILED)),
    (
        "succeeded stage stays unchanged",
        build_status(state="Succeeded"),
        build_status(state="Succeeded", output="other"),
    ),
    ("started stage keeps its digest", OLD, build_status(digest="e")),
    ("finished run stays finished", build_status("Failed", "StageFailed"), OLD),
    ("finished run stays finished", build_status("Succeeded"), change(OLD, completion_time="")),
    ("conditions are well formed", OLD, change(OLD, conditions=OLD.conditions[1:])),
    ("conditions are well formed", OLD, change(OLD, conditions=[*OLD.conditions, OLD.conditions[0]])),
    (
        "conditions are well formed",
        OLD,
        change(OLD, conditions=[msgspec.structs.replace(c, last_transition_time=LATER) for c in OLD.conditions]),
    ),
    ("status describes current generation", OLD, change(OLD, observed_generation=0)),
    ("every second is counted once", OLD, change(OLD, goodput=Goodput(settled_at=LATER, seconds={"training": 59}))),
    ("every second is counted once", change(OLD, goodput=SETTLED), OLD),
    ("times are set once", OLD, change(OLD, start_time=LATER)),
    ("times are set once", OLD, change(OLD, completion_time=LATER)),
]


def find_violated(old: Status, new: Status) -> set[str]:
    """Return the names of the invariants that a new status violates."""
    found = set()
    for invariant in STATUS_INVARIANTS:
        try:
            invariant(RUN, old, new)
        except InvariantViolation:
            found.add(invariant.__name__.replace("_", " "))
    return found


@pytest.mark.parametrize(
    ("invariant", "old", "new"), VIOLATIONS, ids=[f"{i} {name}" for i, (name, *_) in enumerate(VIOLATIONS)]
)
def test_violation_is_detected(invariant, old, new):
    assert invariant in find_violated(old, new)


def test_every_status_invariant_is_violated_here():
    assert {invariant.__name__.replace("_", " ") for invariant in STATUS_INVARIANTS} == {n for n, *_ in VIOLATIONS}


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(change(OLD, goodput=SETTLED), id="time passes"),
        pytest.param(
            change(build_status(state="Restarting", attempt=3, counted_restarts={"Crash": 2}, restarts={"Crash": 2})),
            id="stage restarts",
        ),
        pytest.param(
            change(
                build_status(
                    "Failed", "StageFailed", state="Failed", counted_restarts={"Crash": 2}, last_failure=FAILED
                )
            ),
            id="stage fails beyond its budget",
        ),
    ],
)
def test_valid_change_violates_no_invariant(new):
    moved = [
        msgspec.structs.replace(c, last_transition_time=o.last_transition_time)
        for c, o in zip(new.conditions, OLD.conditions, strict=True)
    ]
    assert find_violated(OLD, change(new, conditions=moved)) == set()
