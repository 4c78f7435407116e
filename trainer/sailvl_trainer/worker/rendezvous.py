"""The rendezvous of an attempt's workers: each start of the ranks waits until all workers have joined the same round.

Called by `worker/agent.py`. Unlike torch's c10d rendezvous, whose state is a pickle in the store, its members are
fixed: the operator sets the number of workers and the index of each, so that counters and short texts suffice. Worker 0
hosts the store, on the pod's address; a single worker has it in memory and listens nowhere. The keys begin with the
attempt's secret, which makes them hard to guess. But the store has no authentication, and lists its keys to every
client: what keeps other pods away is a NetworkPolicy.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from ipaddress import ip_address

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from sailvl_trainer.contract import Env
from sailvl_trainer.rank.settings import Scratch, Settings
from sailvl_trainer.rank.store import CONNECT_TIMEOUT, StoreAddress

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_SECONDS = 86_400
"""Timeout of a round. It is long because pods may start minutes apart (image pulls, scale-up): the operator's start
timeout ends the attempt earlier, and the agent's timeout a rejoin after a restart in place."""
POLL_SECONDS = 0.2
"""Seconds between two checks whether all workers have joined. A blocking wait would log a warning at each timeout."""
MAX_SHOWN_CHARACTERS = 40
"""Longest part of another worker's text that a message shows."""


class FixedRendezvous(RendezvousHandler):
    """A rendezvous whose members are the workers 0 … nodes - 1, of which each keeps its index.

    A worker that restarts its ranks joins the next round; the others see that, restart theirs and join it too.
    """

    def __init__(self, settings: Settings, store: Store, host: str) -> None:
        """`host` and the settings' port are where ranks reach the store, unless there is a single worker."""
        self._settings, self._host = settings, host
        self._prefix = settings.rendezvous_secret if settings.nodes > 1 else "single-worker"
        self._root, self._store = PrefixStore(self._prefix, store), store
        self._process = secrets.token_hex(8)
        self._round = 0

    @property
    def rank_store(self) -> StoreAddress:
        """Where the ranks that this worker starts in the current round find their store."""
        if self._settings.nodes == 1:
            return StoreAddress(path=str(Scratch(self._settings.scratch).store_path(self._round)))
        prefix = f"{self._prefix}/{self._round}/ranks"
        return StoreAddress(host=self._host, port=self._settings.rendezvous_port, prefix=prefix)

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round and wait for all other workers. Raises RendezvousError."""
        self._round += 1
        store = PrefixStore(f"{self._prefix}/{self._round}", self._store)
        try:
            self._join(store)
            self._wait_for_others(store)
        except (DistNetworkError, DistStoreError) as error:
            raise self._report_lost_store(error) from error
        bootstrap = RendezvousStoreInfo(self._host, self._settings.rendezvous_port)
        return RendezvousInfo(PrefixStore("agents", store), self._settings.node_rank, self._settings.nodes, bootstrap)

    def num_nodes_waiting(self) -> int:
        """Return 1 if a worker has joined the next round, so that this one has to join it too; else 0."""
        try:
            return int(self._root.check([f"{self._round + 1}/joined"]))
        except (DistNetworkError, DistStoreError) as error:
            raise self._report_lost_store(error) from error

    def is_closed(self) -> bool:
        """Whether a worker has ended, after which the others can't rejoin."""
        return bool(self._root.check(["closed"]))

    def set_closed(self) -> None:
        """End the rendezvous for all workers."""
        self._root.set("closed", "1")

    def shutdown(self) -> bool:
        """End the rendezvous; return False if the store is gone."""
        try:
            self.set_closed()
        except (DistNetworkError, DistStoreError):
            return False
        return True

    def get_backend(self) -> str:
        """Return the name that torch's agent writes into its events."""
        return "fixed"

    def get_run_id(self) -> str:
        """Return the name that torch's agent writes into its events and directories; it is no secret."""
        return "attempt"

    def _join(self, store: Store) -> None:
        """Record in the store of the round that this worker has joined. Raises RendezvousStateError if it can't be."""
        settings = self._settings
        index, ranks = settings.node_rank, str(settings.processes_per_node)
        if _claim(store, f"worker/{index}", self._process) != self._process:
            raise RendezvousStateError(
                f"another process has joined as worker {index}; give each worker its own {Env.NODE_RANK}"
            )
        if (others := _claim(store, "ranks_per_worker", ranks)) != ranks:
            raise RendezvousStateError(
                f"worker {index} starts {ranks} ranks, but another one {others[:MAX_SHOWN_CHARACTERS]!r}; "
                f"set the same {Env.PROCESSES_PER_NODE} everywhere"
            )
        if store.add("joined", 1) == settings.nodes:
            store.set("complete", "1")

    def _wait_for_others(self, store: Store) -> None:
        until = time.monotonic() + JOIN_TIMEOUT_SECONDS
        while not store.check(["complete"]):
            if self.is_closed():
                raise RendezvousClosedError("another worker has ended, so the ranks can't be restarted in place")
            if time.monotonic() > until:
                raise RendezvousTimeoutError(f"not all workers joined within {JOIN_TIMEOUT_SECONDS} s")
            time.sleep(POLL_SECONDS)

    def _report_lost_store(self, error: Exception) -> RendezvousConnectionError:
        """Log that the store is gone, in case the worker exits for another cause, and return the error to raise."""
        place = f"{self._settings.rendezvous_host}:{self._settings.rendezvous_port}"
        cause = str(error).partition("\n")[0]
        message = f"lost the connection to worker 0, which hosts the store at {place}: {cause}"
        logger.warning(message)
        return RendezvousConnectionError(message)


def build_rendezvous(settings: Settings) -> FixedRendezvous:
    """Return the rendezvous of the attempt; blocks until worker 0 accepts connections.

    Raises RendezvousConnectionError if worker 0 can't listen on its port, DistNetworkError if its store can't be used.
    """
    if settings.nodes == 1:
        return FixedRendezvous(settings, HashStore(), "localhost")
    host, port = settings.rendezvous_host, settings.rendezvous_port
    if settings.node_rank:
        _wait_for_store(host, port)
        return FixedRendezvous(settings, TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT), host)
    listener = _listen(settings)
    address = settings.pod_ip or "localhost"
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=CONNECT_TIMEOUT,
    )
    return FixedRendezvous(settings, store, address)


def is_on_one_machine(settings: Settings) -> bool:
    """Whether all workers of the attempt run on this machine, so that their ranks need the loopback interface only."""
    return settings.nodes == 1 or _is_loopback(settings.rendezvous_host)


def find_loopback_interface() -> str:
    """Return the name of the loopback interface, on Linux or macOS; empty if there is none."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), "")


def _listen(settings: Settings) -> socket.socket:
    """Listen on the pod's address; without one, on loopback if all workers are on this machine, else on all addresses.

    Interfaces besides the pod's own, such as a second network's, are often outside of NetworkPolicies.
    """
    address = settings.pod_ip or ("127.0.0.1" if _is_loopback(settings.rendezvous_host) else "")
    is_dualstack = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dualstack or ":" in address else socket.AF_INET
    try:
        return socket.create_server(
            (address, settings.rendezvous_port), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=is_dualstack
        )
    except OSError as error:
        raise RendezvousConnectionError(
            f"worker 0 can't listen on port {settings.rendezvous_port} of {address or 'all addresses'}: {error}"
        ) from error


def _wait_for_store(host: str, port: int) -> None:
    """Wait for worker 0, whose DNS name may appear minutes later; torch itself gives up after two minutes."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return


def _claim(store: Store, key: str, value: str) -> str:
    """Set a key unless another process has set it, and return its value, which may be any text."""
    found: bytes = store.compare_set(key, "", value)
    return found.decode(errors="replace")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
