"""The rendezvous at which the workers of an attempt find each other: torch's c10d, hosted by the worker of index 0."""

from __future__ import annotations

import socket
import time

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry

from sailvl_trainer.contract import Stage
from sailvl_trainer.rank.settings import Settings

JOIN_TIMEOUT_SECONDS = 86_400
"""Timeout of the first rendezvous. It is long because pods may start minutes apart (image pulls, scale-up); the
operator's start timeout ends the attempt earlier."""
REJOIN_TIMEOUT_SECONDS = 120
"""Timeout of the rendezvous after a restart in place: peers rejoin within seconds, or not at all."""


def build_rendezvous(settings: Settings, stage: Stage) -> RendezvousHandler:
    """Return the rendezvous of the attempt; blocks until the worker of index 0 accepts connections."""
    if settings.node_rank:
        _wait_for_store(settings.rendezvous_host, settings.rendezvous_port)
    return registry.get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"{settings.rendezvous_host}:{settings.rendezvous_port}",
            run_id=f"{stage.namespace}.{stage.run}.{stage.stage}.{stage.attempt}",
            min_nodes=settings.nodes,
            max_nodes=settings.nodes,
            join_timeout=JOIN_TIMEOUT_SECONDS,
            is_host=str(settings.node_rank == 0).lower(),
        )
    )


def _wait_for_store(host: str, port: int) -> None:
    """Wait for worker 0, whose DNS name may appear minutes later; torch itself gives up after two minutes."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
