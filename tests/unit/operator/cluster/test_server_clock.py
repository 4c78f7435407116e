"""Clock of the operator, bounded by the Date headers of the API server."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from sailvl_operator.cluster.server_clock import ServerClock

NOW = 1_800_000_000.0


class SkewedProcess:
    """An API server, and a process whose clock is wrong by some seconds."""

    def __init__(self, skew: float) -> None:
        self.skew, self.server, self.elapsed = skew, NOW, 500.0
        self.clock = ServerClock(wall=lambda: self.server + self.skew, monotonic=lambda: self.elapsed)

    def tick(self, seconds: float) -> None:
        self.server += seconds
        self.elapsed += seconds

    def send_request(self, *, there: float = 0.1, back: float = 0.1) -> None:
        """Send a request that takes some seconds."""
        sent = self.elapsed
        self.tick(there)
        date = formatdate(int(self.server), usegmt=True)
        self.tick(back)
        self.clock.observe_date(date, sent=sent, received=self.elapsed)


@pytest.mark.parametrize(
    ("skew", "off"),
    [
        pytest.param(0.0, (0.0, 0.0), id="correct"),
        pytest.param(0.05, (0.05, 0.05), id="wrong within the bounds"),
        pytest.param(7200.0, (-0.2, 1.2), id="hours ahead"),
        pytest.param(-7200.0, (-1.2, 0.2), id="hours behind"),
    ],
)
def test_own_clock_is_clamped_to_the_bounds(skew, off):
    world = SkewedProcess(skew)
    assert world.clock.now() == NOW + skew, "no response yet"
    world.tick(0.5)
    world.send_request()
    world.tick(1000.0)
    assert off[0] - 1e-6 <= world.clock.now() - world.server <= off[1] + 1e-6


def test_bounds_narrow_with_each_response():
    world = SkewedProcess(7200.0)
    for _ in range(10):
        world.tick(0.37)
        world.send_request(there=0.01, back=0.01)
    assert abs(world.clock.now() - world.server) < 0.2


def test_changed_server_clock_is_followed():
    world = SkewedProcess(0.0)
    world.send_request()
    world.server += 600.0
    world.skew = -600.0
    world.send_request()
    assert abs(world.clock.now() - world.server) < 1.3


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_invalid_date_is_ignored(date):
    world = SkewedProcess(7200.0)
    world.clock.observe_date(date, sent=1.0, received=1.1)
    assert world.clock.now() == NOW + 7200.0
