"""The operator's clients in the simulation: of the API server over a simulated connection, and of /progress."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from sailvl_operator.cluster.client import Client, ClientConfig
from tests.support.simulation.network import OperatorConnection
from tests.support.simulation.workers import SimulatedWorkers


class NoCredentials:
    """Credentials of a client whose server authenticates no client."""

    server = "http://simulation"
    ssl = None

    async def headers(self) -> dict[str, str]:
        """Return no headers."""
        return {}

    def forget(self) -> None:
        """Do nothing: no token is cached."""


class SimulatedClient(Client):
    """The operator's own client over a simulated connection in place of an aiohttp session."""

    def __init__(self, connection: OperatorConnection) -> None:
        super().__init__(NoCredentials(), ClientConfig(page_size=3))
        self._session = connection


class ProgressEndpoints:
    """Answers GET /progress of every worker, in place of an aiohttp session and its response."""

    def __init__(self, workers: SimulatedWorkers, rng: random.Random, body: bytes = b"", status: int = 200) -> None:
        self._workers, self._rng, self._body, self.status = workers, rng, body, status

    def get(self, url: str, **_: Any) -> ProgressEndpoints:
        """Return the response of the worker at an address; some requests fail."""
        progress = self._workers.read_progress(url.split("/")[2].partition(":")[0])
        if progress is None or self._rng.random() < 0.1:
            return ProgressEndpoints(self._workers, self._rng, status=503)
        return ProgressEndpoints(self._workers, self._rng, msgspec.json.encode(progress))

    async def __aenter__(self) -> ProgressEndpoints:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    @property
    def content(self) -> ProgressEndpoints:
        """The stream of the response's body."""
        return self

    async def iter_any(self) -> Any:
        """Yield the body at once."""
        yield self._body
