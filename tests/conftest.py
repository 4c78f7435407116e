"""Fixtures that tests of several folders share."""

import gc

from hypothesis import settings

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
