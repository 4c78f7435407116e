"""Fixtures that tests of several folders share."""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.fuzz import COUNTER, EXAMPLES_PROPERTY, FUZZ_SECONDS

pytest_plugins = ["tests.support.live.cluster"]

settings.register_profile("unhurried", deadline=None)  # tests must not fail because a build machine is busy
settings.load_profile("unhurried")


def pytest_configure() -> None:
    """Stop the garbage collector while modules are imported and tests are collected: none of it becomes garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Start the garbage collector for the objects that the tests make, and leave out those of the collection."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note in a test's report how many random examples it has fed to a reader."""
    COUNTER.examples = 0
    try:
        return (yield)
    finally:
        if COUNTER.examples:
            item.user_properties.append((EXAMPLES_PROPERTY, COUNTER.examples))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of examples of each fuzz test, if they ran for a given time."""
    if not FUZZ_SECONDS:
        return
    counts = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == EXAMPLES_PROPERTY
    }
    terminalreporter.section("random examples")
    for nodeid, number in sorted(counts.items()):
        terminalreporter.write_line(f"{number:>10,}  {nodeid}")
    terminalreporter.write_line(f"{sum(counts.values()):>10,}  in total")
