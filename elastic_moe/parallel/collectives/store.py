"""The key-value store through which groups form. This is the only file of the package that makes a store.

The coordinator hosts the store: rank 0's death must not take it along. The keys of each group have a prefix of their
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Rendezvous:
    """Where the members of a group meet.

    Attributes:
        host, port: of the coordinator's store.
        timeout_s: for connecting to the store, and to the members once all of them have arrived, in seconds.
    """

    host: str
    port: int
    timeout_s: float


class HostedStore:
    """A store in this process; it lives as long as this object.

    Args:
        host: address under which workers reach this process.

    Attributes:
        port: on which the store listens.
    """

    def __init__(self, host: str) -> None:
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.port: int = self._store.port


def connect(rendezvous: Rendezvous, key_prefix: str) -> Store:
    """The coordinator's store as its client sees it, with all keys under a prefix.

    Raises:
        RuntimeError: the store cannot be reached within `rendezvous.timeout_s`.
    """
    limit = timedelta(seconds=rendezvous.timeout_s)
    store = TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=limit)
    return PrefixStore(key_prefix, store)
