"""The key-value store through which a group forms, carried over a connection that shows the run's token.

torch and gloo ask for a store: every member sets its values and reads those of the others. `GroupStore` collects what
is set, sends it to the rendezvous of the coordinator when the first foreign value is asked for, and waits there until
all members have arrived. So there is no store that a stranger could list, fill or wait at. A torch `TCPStore` listens
on all interfaces and asks for nothing.
"""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from elastic_moe.control.codec import decode_rendezvous, encode
from elastic_moe.control.peer_messages import MeetMessage, MetMessage

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host that vanished is noticed in 20 s


@dataclass(frozen=True)
class Rendezvous:
    """Where the members of a group meet.

    Attributes:
        host, port: of the coordinator's rendezvous.
        token: shared secret of the run.
        timeout_s: for connecting to the rendezvous, and to the members once all of them have arrived, in seconds.
    """

    host: str
    port: int
    token: str = field(repr=False)
    timeout_s: float


class GroupStore(Store):
    """One member's view of the values of its group.

    One thread uses it; `cancel` alone may be called by others.

    Args:
        rendezvous: where the members meet.
        group: name of the group, unique in the run.
        rank, world_size: of this process in the group.

    Attributes:
        local_host: this machine's address on the network on which the coordinator was reached.

    Raises:
        OSError: the rendezvous cannot be reached within `rendezvous.timeout_s`.
    """

    def __init__(self, rendezvous: Rendezvous, group: str, rank: int, world_size: int) -> None:
        super().__init__()
        self._rendezvous, self._group, self._rank, self._world_size = rendezvous, group, rank, world_size
        self._values: dict[str, bytes] = {}
        self._unsent: dict[str, bytes] = {}
        self._socket = socket.create_connection((rendezvous.host, rendezvous.port), rendezvous.timeout_s)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._lines = self._socket.makefile("rb")
        self.local_host: str = self._socket.getsockname()[0]

    def cancel(self) -> None:
        """End a wait that is under way, and every later one."""
        with contextlib.suppress(OSError):  # it is closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave the rendezvous. The values that are known stay."""
        self._lines.close()
        self._socket.close()

    # --- called by torch ---

    def set(self, key: str, value: str | bytes) -> None:
        self._unsent[key] = self._values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all members have arrived. `timeout` does not count: the slowest member may take its time.

        Raises:
            RuntimeError: the connection broke, or was cancelled, or no member has set the keys.
        """
        if not self.check(keys):
            self._meet()
        if not self.check(keys):
            raise RuntimeError(f"no member of {self._group} has set {', '.join(keys)}")

    def _meet(self) -> None:
        """Exchange values with all other members."""
        pairs = tuple((key, base64.b64encode(value).decode()) for key, value in self._unsent.items())
        message = MeetMessage(self._rendezvous.token, self._group, self._rank, self._world_size, pairs)
        self._unsent = {}
        try:
            self._socket.sendall(encode(message))
            line = self._lines.readline()
        except OSError as error:
            raise RuntimeError(f"the rendezvous broke: {error}") from error
        if not line.endswith(b"\n"):
            raise RuntimeError("the rendezvous was closed before all members had arrived")
        answer = decode_rendezvous(line)
        assert isinstance(answer, MetMessage)
        self._values |= {key: base64.b64decode(value) for key, value in answer.values}
