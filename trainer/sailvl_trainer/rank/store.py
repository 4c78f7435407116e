"""The key-value store with which the ranks of an attempt start their process group, and on which they share tasks.

The worker's agent passes each rank the address in STORE_VARIABLE. The ranks of one worker meet in a file of its scratch
directory, so that nothing listens on the network; those of several workers at the store that worker 0 hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

STORE_VARIABLE = "SAILVL_RANK_STORE"
"""Variable in which the worker's agent passes each rank its `StoreAddress`, as JSON."""
CONNECT_TIMEOUT = timedelta(minutes=2)
"""Time within which a rank has to reach a store on the network, which its worker has reached already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """Where the ranks of an attempt find their store; each start of the ranks has its own file or key prefix."""

    path: str = ""
    """Path of the file; empty if the store is on the network."""
    host: str = ""
    """Host name or address of a store on the network."""
    port: int = 0
    """Port of a store on the network."""
    prefix: str = ""
    """Prefix of all keys of a store on the network."""


def open_store(address: StoreAddress, world_size: int) -> Store:
    """Open the store of `world_size` ranks. Raises DistNetworkError if a store on the network can't be reached."""
    if address.path:
        return FileStore(address.path, world_size)
    client = TCPStore(address.host, address.port, is_master=False, timeout=CONNECT_TIMEOUT)
    return PrefixStore(address.prefix, client)
