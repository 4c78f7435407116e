"""Fixtures that tests of several folders share."""

from hypothesis import settings

pytest_plugins = ["tests.support.live.cluster"]

settings.register_profile("unhurried", deadline=None)  # machines that build are busy: time is no reason to fail
settings.load_profile("unhurried")
