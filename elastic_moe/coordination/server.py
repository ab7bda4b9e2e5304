"""The coordinator's server: one TCP connection per worker, in a thread of its own. It uses no Ray.

`coordination/membership.py` decides in the same loop turn in which a connection closes, so a death is answered within
milliseconds. The tick serves conditions that only time reveals, such as silence. The rendezvous of groups that form has
a server of its own beside this one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control import events as ev
from elastic_moe.control import messages as msg
from elastic_moe.control.codec import VersionMismatch, decode_from_worker, encode
from elastic_moe.control.message_events import event_of_request
from elastic_moe.control.requests import Request
from elastic_moe.control.view_changes import change_between
from elastic_moe.coordination.gate import Gate, LineReader, WrongToken
from elastic_moe.coordination.listener import ListenerThread
from elastic_moe.coordination.membership import Membership, RunStatus, Sink
from elastic_moe.coordination.rendezvous import RendezvousServer

TICK_S = 0.1

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Connection:
    """One worker's connection. `view`: the last one that it took."""

    writer: asyncio.StreamWriter
    view: msg.ViewMessage | None = None


class ControlServer:
    """Serves one run.

    Args:
        config: the run's configuration.
        token: shared secret of the run; a worker with another token is turned away.
        target: workers the run starts with.
        host: address to listen on, and under which workers reach this process.
        on_record, on_event, on_shard: called in the server's thread, as `Membership` describes them.
        restarted: another coordinator of this run was here before.

    Attributes:
        welcome: what a worker is told when it has registered.
    """

    def __init__(
        self,
        config: TrainConfig,
        token: str,
        target: int,
        host: str = "127.0.0.1",
        on_record: Sink = lambda _: None,
        on_event: Sink = lambda _: None,
        on_shard: Sink = lambda _: None,
        restarted: bool = False,
    ) -> None:
        self.welcome = msg.WelcomeMessage()
        self._host, self._gate = host, Gate(token)
        self._listener = ListenerThread("control-server", host, self._serve, self._tick, TICK_S)
        self._membership = Membership(config, target, self, on_record, on_event, on_shard, restarted)
        self._connections: dict[str, _Connection] = {}  # by worker
        self._rendezvous = RendezvousServer(host, token)

    # --- called from any thread ---

    def start(self) -> tuple[str, int]:
        """Start serving. Returns the address that workers connect to.

        Raises:
            RuntimeError: the server cannot listen on its host.
        """
        self._rendezvous.start()
        self._listener.start()
        return self._host, self._listener.port

    def submit(self, request: Request) -> None:
        """Take a request; it is answered in the server's thread."""
        event = event_of_request(request)
        self._listener.call(lambda: self._guard(lambda: self._membership.observe(event)))

    def status(self) -> RunStatus:
        """The state of the run."""
        return self._membership.status()

    def close(self) -> None:
        """Stop serving and cut all connections."""
        self._listener.close()
        self._rendezvous.close()

    # --- called by the membership, in the server's thread ---

    @property
    def store_address(self) -> tuple[str, int]:
        return self._host, self._rendezvous.port

    def send(self, workers: Sequence[str], message: msg.CoordinatorMessage) -> None:
        """Send a message. A view goes as a change of the last one that a worker's connection brought, where it can."""
        is_view = isinstance(message, msg.ViewMessage)
        lines: dict[int, bytes] = {}  # by the identity of the view before
        for worker in workers:
            connection = self._connections.get(worker)
            if connection is None or connection.writer.is_closing():
                continue
            before = connection.view if is_view else None
            if id(before) not in lines:
                change = change_between(before, message) if is_view and before is not None else None
                lines[id(before)] = encode(change or message)
            connection.writer.write(lines[id(before)])
            if is_view:
                connection.view = message

    def disconnect(self, worker: str) -> None:
        if (connection := self._connections.pop(worker, None)) is not None:
            connection.writer.close()

    # --- the server's thread ---

    def _tick(self) -> None:
        self._guard(lambda: self._membership.observe(ev.Tick()))

    async def _serve(self, lines: LineReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first message to its end. Nonsense and silence at the start end it too."""
        hello = await self._admitted(lines, writer)
        if hello is None:
            return
        worker = hello.worker
        self._connections[worker] = connection = _Connection(writer)
        self._receive(worker, hello)
        try:
            while line := await lines.line():
                self._receive(worker, decode_from_worker(line))
        finally:
            if self._connections.get(worker) is connection:
                del self._connections[worker]
                if not self._listener.closing:
                    self._guard(lambda: self._membership.observe(ev.Closed(worker)))

    async def _admitted(self, lines: LineReader, writer: asyncio.StreamWriter) -> msg.HelloMessage | None:
        """The first message of a connection, or None after the peer was told why it is turned away.

        Raises:
            TimeoutError, OSError, ValueError: the line did not come, or is no hello.
        """
        try:
            hello = decode_from_worker(await self._gate.admit(lines, writer))
        except (VersionMismatch, WrongToken) as error:
            writer.write(encode(msg.EvictedMessage(str(error))))
            return None
        if not isinstance(hello, msg.HelloMessage):
            raise ValueError("the first message of a connection must be a hello")
        if reason := self._membership.refusal(hello):
            writer.write(encode(msg.EvictedMessage(reason)))
            return None
        return hello

    def _receive(self, worker: str, message: msg.WorkerMessage) -> None:
        self._guard(lambda: self._membership.receive(worker, message))

    def _guard(self, action: Callable[[], None]) -> None:
        """Do one thing in the server's thread. The thread must outlive an error in it."""
        try:
            action()
        except Exception:
            logger.exception("the coordinator could not take in an event")
