"""Background loops continue after an unexpected error; only lost leadership or a broken configuration ends them."""

from __future__ import annotations

import asyncio

import pytest

from sailvl_operator.api.untrusted import DocumentError
from sailvl_operator.cluster import background
from sailvl_operator.cluster.background import contain_errors, keep_running
from sailvl_operator.errors import CredentialsError, LeaseLost, SettingsError

UNEXPECTED = [RecursionError("deep"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), MemoryError(), KeyError("uid")]
FATAL = [LeaseLost("another replica leads"), CredentialsError("none"), SettingsError("invalid")]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(background, "_RESTART_SECONDS", 0.0)


async def test_loop_is_restarted_after_every_unexpected_error():
    failures, counted = iter(UNEXPECTED), []

    async def run() -> None:
        for failure in failures:
            raise failure

    await keep_running("recorder", run, counted.append)
    assert counted == ["recorder"] * len(UNEXPECTED)


@pytest.mark.parametrize("error", [*FATAL, asyncio.CancelledError()], ids=lambda error: type(error).__name__)
async def test_loop_ends_by_a_fatal_error_and_by_cancellation(error):
    counted = []

    async def run() -> None:
        raise error

    with pytest.raises(type(error)):
        await keep_running("recorder", run, counted.append)
    with pytest.raises(type(error)), contain_errors("recorder", counted.append, subject="an Event"):
        raise error
    assert counted == []


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_error_of_one_item_is_counted_and_logged_with_its_name(error, caplog):
    counted = []
    with contain_errors("watch-audit", counted.append, subject="team/demo"):
        raise error
    assert counted == ["watch-audit"]
    assert "skipping team/demo" in caplog.text


def test_unusable_input_is_logged_in_one_line_and_not_counted(caplog):
    counted = []
    with contain_errors("informer-pods", counted.append, subject="pods team/x"):
        raise DocumentError("'0000' is not a time")
    assert counted == []
    [record] = caplog.records
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert record.getMessage() == "skipping pods team/x: '0000' is not a time"
