"""Fixtures that tests of several folders share."""

from hypothesis import settings

pytest_plugins = ["tests.support.live.cluster"]

settings.register_profile("unhurried", deadline=None)  # tests must not fail because a build machine is busy
settings.load_profile("unhurried")
