"""The worker's connection to the coordinator: a thread keeps one TCP connection and can interrupt the main thread.

The main thread waits for the coordinator only in `wait_view`. When the coordinator is lost, the thread asks `find` for
the address of its next life and registers again with the newest view; training goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

from elastic_moe.config.pace import pace
from elastic_moe.control import messages as msg
from elastic_moe.control.codec import VersionMismatch, decode_from_coordinator, encode
from elastic_moe.control.view_changes import changed
from elastic_moe.runtime.lease import Lease
from elastic_moe.runtime.links import LinkProber
from elastic_moe.runtime.mailbox import Inbox, Outbox
from elastic_moe.runtime.registration import Registration
from elastic_moe.types import View

RETRY_S = 0.1
CONNECT_TIMEOUT_S = 3.0
SEND_TIMEOUT_S = 30.0  # a coordinator that reads nothing for so long counts as lost
DRAIN_TIMEOUT_S = 1.0  # at a close, for the coordinator to read the last messages

Find = Callable[[], tuple[str, int] | None]
logger = logging.getLogger(__name__)


class CoordinatorClient:
    """One worker's side of the coordinator.

    Args:
        find: returns the coordinator's address, or None while there is none; called again after every lost connection.
        token: shared secret of the run.
        worker, node, pid, slots: who this is, as in `Member`.
        heartbeat_s: seconds between two heartbeats, see `config.pace`.
        lease_s: length of the lease.

    Attributes:
        worker: this worker's id.
        lease: the permission to commit steps.
        inbox: what the coordinator has told this worker.
        outbox: messages to the coordinator.
    """

    def __init__(
        self,
        find: Find,
        token: str,
        worker: str,
        node: str,
        pid: int,
        slots: int = 0,
        heartbeat_s: float = 0.5,
        lease_s: float = 30.0,
    ) -> None:
        self.worker = worker
        self.inbox = Inbox(worker)
        self.lease = Lease(self.inbox, lease_s)
        self._registration = Registration(token, worker, node, pid, slots)
        self._connection = ConnectionThread(find, self._registration, self.inbox, heartbeat_s, lease_s)
        self.outbox = self._connection.outbox

    def start(self, updates_on: str = "", placed_s: float = 0.0, node_kind: str = "") -> None:
        """Start the thread; it connects in the background. The arguments are those of `HelloMessage`."""
        registration = self._registration
        registration.updates_on, registration.placed_s, registration.node_kind = updates_on, placed_s, node_kind
        self._connection.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send the remaining messages, as far as the coordinator takes them within `timeout_s`, and end the thread."""
        self._connection.close(0.0 if self.inbox.evicted else timeout_s)
        self.inbox.close()

    @property
    def stop_requested(self) -> bool:
        """The run should end after the step in flight."""
        return self.inbox.stop_requested

    def superseded(self, generation: int) -> bool:
        """Whether a view newer than `generation` is here, or this worker was released."""
        return self.inbox.superseded(generation)

    def wait_view(self, after_generation: int, patience_s: float = math.inf) -> msg.ViewMessage | None:
        """Wait for a view or a hold newer than `after_generation`. Returns None when this worker was released.

        Raises:
            Evicted: the coordinator no longer counts this worker as a member.
            CoordinatorLost: it was not heard for `patience_s`.
        """
        return self.inbox.wait_view(after_generation, patience_s)

    def begin_view(
        self, view: View, on_abort: Callable[[str], None], progress: Callable[[], tuple[int, int]] | None = None
    ) -> None:
        """From now on live in `view`.

        Args:
            view: the view that is entered.
            on_abort: called with a reason when the view is over before its time, at once or in the connection's thread.
            progress: (step in the making, collectives begun and completed); called for every heartbeat in the
                connection's thread, so it must be quick and thread-safe.
        """
        # Before the generation: old progress under a new generation would hide that the main thread stands still.
        self._registration.progress = progress or (lambda: (0, 0))
        self.inbox.begin_view(view, on_abort)

    def ready(self) -> None:
        """This worker has warmed up and may be put into a view."""
        self._registration.ready = True
        self.outbox.add(msg.ReadyMessage())

    def entered(self, generation: int, info: Mapping[str, Any] | None) -> None:
        """This worker has its share of the view's state. `info`: how it got there, for the event log."""
        self._registration.entered = generation
        self.outbox.add(msg.EnteredMessage(generation, info))

    def suspect(self, generation: int, error: str) -> None:
        """A collective of this generation failed."""
        self.outbox.add(msg.SuspectMessage(generation, error))

    def record(self, record: Mapping[str, Any]) -> None:
        """The record of a committed step."""
        self.outbox.add(msg.RecordMessage(record))

    def event(self, event: Mapping[str, Any]) -> None:
        """A line for the event log."""
        self.outbox.add(msg.EventMessage(event))

    def shard(self, shard: Mapping[str, Any]) -> None:
        """A checkpoint shard is written."""
        self.outbox.add(msg.ShardMessage(shard))

    def left(self, error: str = "") -> None:
        """This worker ends: no view contains it any more, or its program has failed with `error`."""
        self.outbox.add(msg.FailingMessage(error) if error else msg.LeftMessage())

    def finished(self) -> None:
        """This worker did all steps of the run, or agreed to stop."""
        self.outbox.add(msg.FinishedMessage())


class ConnectionThread:
    """Keeps one TCP connection to the coordinator, and makes a new one whenever it is lost.

    Args:
        find: returns the coordinator's address, or None while there is none.
        registration: this worker's state, for `hello` and heartbeats.
        inbox: takes the coordinator's messages.
        heartbeat_s: seconds between two heartbeats.
        lease_s: length of the lease.

    Attributes:
        outbox: messages to send.
        connection: the present connection, or None.
    """

    def __init__(
        self, find: Find, registration: Registration, inbox: Inbox, heartbeat_s: float, lease_s: float
    ) -> None:
        self.find = find
        self.outbox = Outbox(self._wake)
        self.connection: socket.socket | None = None
        self._registration, self._inbox = registration, inbox
        self._heartbeat_s, self._lease_s = heartbeat_s, lease_s
        self._links = LinkProber(registration.token, registration.worker, self.outbox.add)
        self._closed = threading.Event()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._view: msg.ViewMessage | None = None  # the last one that the present connection brought
        self._reported = ""
        self._thread = threading.Thread(target=self._run, name="coordinator-client", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End the thread after the outbox is empty, or after `timeout_s`."""
        if self._thread.is_alive():
            self.outbox.wait_empty(timeout_s)
        self._closed.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(CONNECT_TIMEOUT_S + DRAIN_TIMEOUT_S)
        else:
            self._close_wake_sockets()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or closed
            self._wake_in.send(b"x")

    def _close_wake_sockets(self) -> None:
        self._wake_in.close()
        self._wake_out.close()

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._closed.is_set() and not self._inbox.evicted:
                try:
                    self._connect_and_serve()
                except Exception as error:  # noqa: BLE001 - the thread must outlive it, or the worker is silent
                    self._report(error)
                if not self._inbox.evicted:
                    self._closed.wait(RETRY_S)
        finally:
            self._links.close()
            self.outbox.abandon()
            self._close_wake_sockets()

    def _report(self, error: Exception) -> None:
        """Report an unexpected error, and go on with the next connection. The same error is reported once."""
        if repr(error) != self._reported:
            self._reported = repr(error)
            logger.error("the connection to the coordinator failed, and is made anew", exc_info=error)

    def _connect_and_serve(self) -> None:
        connection = self._connect()
        if connection is None:
            return
        self.connection = connection
        try:
            self._links.open(connection.getsockname()[0])
            self._registration.address = self._links.address
            with connection, contextlib.suppress(OSError):  # the connection broke: the next one follows
                self._serve(connection)
        finally:
            self.connection = None

    def _connect(self) -> socket.socket | None:
        address = self.find()
        if address is None:
            return None
        try:
            connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        except OSError:
            return None
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: also end the connection to a host that vanished silently
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT_S))
        return connection

    def _serve(self, connection: socket.socket) -> None:
        """Talk on one connection until it breaks, the client is closed or this worker is evicted."""
        hello = self._registration.hello(self._inbox.newest, self._inbox.lapsed(self._lease_s))
        connection.sendall(encode(hello) + self.outbox.resent())
        self._view = None
        buffer, heartbeat_s = b"", 0.0  # when the next heartbeat is due
        while not self._inbox.evicted:
            now_s = time.monotonic()
            if now_s >= heartbeat_s:
                connection.sendall(encode(self._registration.heartbeat(self._inbox.generation)))
                members = 0 if self._view is None else self._view.view.world_size
                heartbeat_s = now_s + pace(self._heartbeat_s, members)
            self._send_waiting(connection)
            if self._closed.is_set():
                _close_after_reading(connection)
                return
            readable = wait([connection, self._wake_out], max(0.0, heartbeat_s - now_s))
            if self._wake_out in readable:
                self._wake_out.recv(4096)
            if connection in readable:
                data = connection.recv(1 << 16)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    if self._receive(line):
                        heartbeat_s = 0.0

    def _send_waiting(self, connection: socket.socket) -> None:
        lines = self.outbox.waiting()
        if lines:
            connection.sendall(b"".join(lines))
        self.outbox.mark_sent(len(lines))

    def _receive(self, line: bytes) -> bool:
        """Take in one message. Returns whether the coordinator wants a heartbeat at once."""
        try:
            message = decode_from_coordinator(line)
        except VersionMismatch as error:
            message = msg.EvictedMessage(str(error))
        if isinstance(message, msg.ViewChangeMessage):
            message = changed(self._view, message)
        if isinstance(message, msg.ViewMessage):
            self._view = message
        if isinstance(message, msg.CheckLinksMessage):
            self._links.check(message)
        self._inbox.receive(message)
        if isinstance(message, msg.AliveMessage):
            self.outbox.forget_recorded(message.recorded)
            self.outbox.forget_entered(message.sent_s)
        return isinstance(message, msg.ProbeMessage)


def _close_after_reading(connection: socket.socket) -> None:
    """Close so that the last messages arrive: a plain close with unread input would reset the connection."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(DRAIN_TIMEOUT_S)
    while connection.recv(1 << 16):
        pass
