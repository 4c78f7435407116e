"""Names of metrics that the workers of an attempt report, over many answers."""

from __future__ import annotations

from msgspec.structs import replace

from sailvl_operator.cluster.metric_names import MetricNames
from sailvl_operator.core.observe import PodRecord
from sailvl_operator.core.reports import MAX_METRICS
from sailvl_trainer.contract import Progress
from tests.support.builders.operator import build_pod

KEY = ("team", "demo")


def build_report(*names: str) -> Progress:
    return Progress(attempt=1, phase="running", metrics=dict.fromkeys(names, 1.0))


class Reporting:
    """Answers of workers in turn, and how many of their metrics were left out."""

    def __init__(self) -> None:
        self.omitted: list[int] = []
        self.names = MetricNames(self.omitted.append)

    def report(self, *names: str, pod: PodRecord | None = None) -> set[str]:
        """Return the names that are left of an answer."""
        return set(self.names.restrict(pod or build_pod("curate"), build_report(*names)).metrics)


def test_other_names_in_every_answer_are_left_out_once_there_are_too_many():
    reporting = Reporting()
    answers = [{f"a{answer}-{n}" for n in range(MAX_METRICS)} for answer in range(50)]
    found = set[str]().union(*(reporting.report(*names) for names in answers))
    assert found == answers[0]
    assert reporting.omitted == [MAX_METRICS] * 49


def test_names_that_were_reported_first_keep_being_taken():
    reporting = Reporting()
    assert reporting.report("loss", "m000") == {"loss", "m000"}
    later = reporting.report("loss", *(f"m{n:03d}" for n in range(100)))
    assert later == {"loss", *(f"m{n:03d}" for n in range(MAX_METRICS - 1))}
    assert reporting.report("z", "loss") == {"loss"}
    assert reporting.omitted == [101 - MAX_METRICS, 1]


def test_every_attempt_of_every_run_has_names_of_its_own():
    reporting, pod = Reporting(), build_pod("curate")
    reporting.report(*(f"m{n}" for n in range(MAX_METRICS)))
    others = ({"attempt": 2}, {"stage": "sft"}, {"run": "other"}, {"namespace": "other"}, {"run_uid": "new"})
    for fields in others:
        assert reporting.report("x", pod=replace(pod, **fields)) == {"x"}, fields


def test_names_of_closed_attempts_are_forgotten():
    reporting, pod = Reporting(), build_pod("curate")
    for attempt in (1, 2):
        reporting.report(*(f"m{n}" for n in range(MAX_METRICS)), pod=replace(pod, attempt=attempt))
    reporting.names.forget(KEY, lambda _, attempt: attempt == 1)
    assert reporting.report("x", pod=replace(pod, attempt=1)) == {"x"}
    assert reporting.report("x", pod=replace(pod, attempt=2)) == set()
    reporting.names.forget(KEY, lambda *_: True)
    assert reporting.names._names == {}
