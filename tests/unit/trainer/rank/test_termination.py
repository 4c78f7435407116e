"""A termination message is complete JSON within the kubelet's limit, whatever it has to drop."""

from __future__ import annotations

import pytest

from sailvl_trainer.contract import Result, Termination
from sailvl_trainer.rank.termination import encode_termination
from sailvl_trainer.storage.codec import decode

LONG_TEXTS = [
    pytest.param({"message": "m" * 9000}, id="a long message"),
    pytest.param({"traceback": "é" * 9000}, id="a long traceback of two-byte characters"),
    pytest.param({"message": '"\\' * 4000, "traceback": "\n" * 5000}, id="characters that JSON escapes"),
]


@pytest.mark.parametrize("fields", LONG_TEXTS)
def test_termination_message_is_complete_json_within_the_limit(fields: dict[str, str]) -> None:
    data = encode_termination(Termination(exit_code=1, rank=3, **fields))
    assert len(data) <= 4096
    assert decode(Termination, data).rank == 3


def test_result_with_many_metrics_fits() -> None:
    result = Result(
        stage="e",
        kind="evaluate",
        digest="d",
        attempt=1,
        output="o",
        metrics={f"metric-{i:04d}": 1 / 3 for i in range(300)},
    )
    found = decode(Termination, encode_termination(Termination(exit_code=0, result=result)))
    assert found.result is not None
    assert found.result.metrics["metric-0000"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("limit", [4096, 560])
def test_traceback_is_shortened_first_then_message_then_metrics(limit: int) -> None:
    result = Result(
        stage="e", kind="evaluate", digest="d", attempt=1, output="o", metrics={f"m{i}": 1.0 for i in range(20)}
    )
    whole = Termination(exit_code=1, message="m" * 3000, traceback="first\n" * 2000 + "last", result=result)
    data = encode_termination(whole, limit)
    assert len(data) <= limit
    decoded = decode(Termination, data)
    assert decoded.result is not None
    if limit == 4096:
        assert decoded.traceback.endswith("last")
        assert (decoded.message, decoded.result) == (whole.message, result)
    else:
        assert (decoded.traceback, len(decoded.message)) == ("", 200)
        assert 0 < len(decoded.result.metrics) < 20


def test_lone_surrogate_is_replaced() -> None:
    decoded = decode(Termination, encode_termination(Termination(exit_code=65, message="no file \udcff.jpg")))
    assert decoded.message == "no file ?.jpg"
