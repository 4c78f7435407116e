"""How the workers of an attempt find each other: torch's c10d rendezvous, hosted by the worker of index 0."""

from __future__ import annotations

import socket
import time

from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry

from sailvl_trainer.contract import Stage
from sailvl_trainer.rank.settings import Settings

JOIN_TIMEOUT_SECONDS = 86_400
"""For the first time: pods may be minutes apart (pulls, scale-up). The operator's startTimeoutSeconds ends it."""
REJOIN_TIMEOUT_SECONDS = 120
"""After a restart in place: neighbours notice within seconds, or are gone."""


def build_rendezvous(settings: Settings, stage: Stage) -> RendezvousHandler:
    """Blocks until the worker of index 0 is there."""
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
    """Worker 0 may be minutes behind, its name unknown to DNS as yet; torch itself gives up after two."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
