"""Whose time it is: ours, unless the API server's answers contradict it."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from sailvl_operator.cluster.server_clock import ServerClock

NOW = 1_800_000_000.0


class World:
    """A server, and a process whose clock is off by some seconds."""

    def __init__(self, skew: float) -> None:
        self.skew, self.server, self.elapsed = skew, NOW, 500.0
        self.clock = ServerClock(wall=lambda: self.server + self.skew, monotonic=lambda: self.elapsed)

    def tick(self, seconds: float) -> None:
        self.server += seconds
        self.elapsed += seconds

    def ask(self, *, there: float = 0.1, back: float = 0.1) -> None:
        """A request that takes so many seconds."""
        sent = self.elapsed
        self.tick(there)
        date = formatdate(int(self.server), usegmt=True)
        self.tick(back)
        self.clock.observe_date(date, sent=sent, received=self.elapsed)


@pytest.mark.parametrize(
    ("skew", "off"),
    [
        pytest.param(0.0, (0.0, 0.0), id="agrees"),
        pytest.param(0.05, (0.05, 0.05), id="a little off, within what the answers allow for"),
        pytest.param(7200.0, (-0.2, 1.2), id="hours ahead"),
        pytest.param(-7200.0, (-1.2, 0.2), id="hours behind"),
    ],
)
def test_it_is_ours_as_far_as_the_server_allows(skew, off):
    world = World(skew)
    assert world.clock.now() == NOW + skew, "nothing was heard yet"
    world.tick(0.5)
    world.ask()
    world.tick(1000.0)
    assert off[0] - 1e-6 <= world.clock.now() - world.server <= off[1] + 1e-6


def test_it_grows_more_exact_with_each_answer():
    world = World(7200.0)
    for _ in range(10):
        world.tick(0.37)
        world.ask(there=0.01, back=0.01)
    assert abs(world.clock.now() - world.server) < 0.2


def test_a_server_whose_clock_is_set_is_followed():
    world = World(0.0)
    world.ask()
    world.server += 600.0
    world.skew = -600.0
    world.ask()
    assert abs(world.clock.now() - world.server) < 1.3


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_what_cannot_be_read_says_nothing(date):
    world = World(7200.0)
    world.clock.observe_date(date, sent=1.0, received=1.1)
    assert world.clock.now() == NOW + 7200.0
