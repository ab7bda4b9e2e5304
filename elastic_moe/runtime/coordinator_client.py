"""The worker's line to the coordinator: a thread that keeps one TCP connection, answers for the process, and wakes the main thread.

The main thread never waits for the coordinator except in `wait_view`. When the coordinator is lost the thread asks `find` for its next
incarnation and re-registers with the view it knows; training goes on meanwhile. Messages are newline-delimited JSON (`control/events.py`).
Records and shard reports that may have been lost with the coordinator are sent again; the receiver drops what it has.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic_moe.control.events import view_from_wire, view_to_wire
from elastic_moe.errors import Evicted
from elastic_moe.types import View

RETRY_S = 0.1
CONNECT_TIMEOUT_S = 3.0
SEND_TIMEOUT_S = 30.0  # a coordinator that takes nothing for so long is as good as lost
RECENT = 64  # records and shard reports sent again after the coordinator was lost

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ViewMessage:
    """A view as published: whether it may wait for a step boundary, and the store through which its groups form."""

    view: View
    planned: bool
    store: tuple[str, int]
    load: None = None


class CoordinatorClient:
    """One worker's connection to the coordinator.

    Args:
        find: returns the coordinator's address, or None while there is none; called again after every lost connection.
        token: shared secret of the run.
        worker, node, pid, slots: who this is, as in `Member`.
        heartbeat_s: seconds between two signs of life.

    Attributes:
        pending: newest view not yet entered, or None.
        stop_requested: the run should end after the step in flight.
    """

    def __init__(
        self,
        find: Callable[[], tuple[str, int] | None],
        token: str,
        worker: str,
        node: str,
        pid: int,
        slots: int = 0,
        heartbeat_s: float = 0.5,
    ) -> None:
        self.worker = worker
        self.stop_requested = False
        self._find, self._token, self._heartbeat_s = find, token, heartbeat_s
        self._who: Json = {"worker": worker, "node": node, "pid": pid, "slots": slots}
        self._changed = threading.Condition()
        self._outgoing: deque[Json] = deque()
        self._recent: deque[Json] = deque(maxlen=RECENT)  # sent, and perhaps never read
        self._newest: ViewMessage | None = None
        self._unplanned = 0  # newest generation that must not wait for a step boundary
        self._held = 0  # newest generation that was put on hold
        self._evicted = ""
        self._released = False
        self._ready = False
        self._finished = False
        self._watched = 0
        self._entered = 0
        self._on_abort: Callable[[str], None] | None = None
        self._progress: Callable[[], tuple[int, int]] | None = None
        self._connection: socket.socket | None = None
        self._closed = threading.Event()
        self._idle = threading.Event()  # nothing is left to send
        self._idle.set()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)

    # --- the main thread's side ---

    def start(self) -> None:
        """Start the thread; the connection is made in the background."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is left, as far as the coordinator takes it within `timeout_s`, and end the thread."""
        if self._thread.is_alive():
            self._idle.wait(0.0 if self._evicted else timeout_s)
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(CONNECT_TIMEOUT_S + 1.0)

    @property
    def pending(self) -> ViewMessage | None:
        newest = self._newest
        return newest if newest is not None and newest.view.generation > self._watched else None

    def newer_than(self, generation: int) -> bool:
        """Whether a newer view is here, or this worker was released."""
        newest = self._newest
        return self._released or (newest is not None and newest.view.generation > generation)

    def wait_view(self, after_generation: int) -> ViewMessage | None:
        """Wait for a view newer than `after_generation`. Returns None when this worker was released.

        Raises:
            Evicted: the coordinator no longer counts this worker as a member.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._evicted or self._released or self._closed.is_set() or self.newer_than(after_generation)
            )
            if self._evicted:
                raise Evicted(self._evicted)
            if self._released or self._closed.is_set():
                return None
            return self._newest

    def watch(
        self, view: View, on_abort: Callable[[str], None], progress: Callable[[], tuple[int, int]] | None = None
    ) -> None:
        """From now on live in `view`.

        Args:
            view: the view that is entered.
            on_abort: called with a reason, from the line's thread or at once, when the view is over before its time.
            progress: (step in the making, collectives begun and completed), asked at every heartbeat; must be quick and thread-safe.
        """
        with self._changed:
            self._watched, self._on_abort, self._progress = view.generation, on_abort, progress
            reason = self._abort_reason()
        if reason:
            on_abort(reason)

    def ready(self) -> None:
        self._ready = True
        self._send({"type": "ready"})

    def entered(self, generation: int, info: Json | None) -> None:
        """This worker has its share of the view's state."""
        self._entered = generation
        self._send({"type": "entered", "generation": generation, "info": info})

    def suspect(self, generation: int, error: str) -> None:
        """A collective of this generation failed."""
        self._send({"type": "suspect", "generation": generation, "error": error})

    def record(self, record: Json) -> None:
        self._send({"type": "record", "record": record})

    def event(self, event: Json) -> None:
        self._send({"type": "event", "event": event})

    def shard(self, shard: Json) -> None:
        self._send({"type": "shard", "shard": shard})

    def left(self) -> None:
        self._send({"type": "left"})

    def finished(self) -> None:
        self._finished = True
        self._send({"type": "finished"})

    def _send(self, message: Json) -> None:
        with self._changed:
            self._outgoing.append(message)
            self._idle.clear()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or closed
            self._wake_in.send(b"x")

    # --- the thread's side ---

    def _run(self) -> None:
        try:
            while not self._closed.is_set() and not self._evicted:
                connection = self._connect()
                if connection is not None:
                    self._connection = connection
                    with connection:
                        self._serve(connection)
                    self._connection = None
                if not self._evicted:
                    self._closed.wait(RETRY_S)
        finally:
            self._idle.set()
            self._wake_in.close()
            self._wake_out.close()

    def _connect(self) -> socket.socket | None:
        address = self._find()
        if address is None:
            return None
        try:
            connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
        except OSError:
            return None
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(
            socket, "TCP_USER_TIMEOUT"
        ):  # Linux: a coordinator's host that vanished without a word ends the connection too
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT_S))
        return connection

    def _hello(self) -> list[Json]:
        """What a new connection begins with: who this is, and what a coordinator that has lost its memory must know."""
        newest = self._newest
        hello = self._who | {
            "type": "hello",
            "token": self._token,
            "ready": self._ready,
            "entered": self._entered,
            "step": max(0, self._progress()[0] - 1) if self._progress else 0,
            "generation": 0,
        }
        if newest is not None:
            hello |= view_to_wire(newest.view)
        again = list(self._recent)
        if self._finished and {"type": "finished"} not in self._outgoing:
            again.append({"type": "finished"})
        return [hello, *again]

    def _heartbeat(self) -> Json:
        step, progress = self._progress() if self._progress else (0, 0)
        return {"type": "heartbeat", "generation": self._watched, "step": step, "progress": progress}

    def _serve(self, connection: socket.socket) -> None:
        """Talk on one connection until it breaks, the line is closed or this worker is evicted."""
        buffer = b""
        try:
            with self._changed:
                opening = self._hello()
            connection.sendall(_pack(opening))
            beat_s = 0.0
            while not self._evicted:
                now_s = time.monotonic()
                if now_s >= beat_s:
                    connection.sendall(_pack([self._heartbeat()]))
                    beat_s = now_s + self._heartbeat_s
                self._flush(connection)
                if self._closed.is_set():
                    _end(connection)
                    return
                readable, _, _ = select.select([connection, self._wake_out], [], [], max(0.0, beat_s - now_s))
                if self._wake_out in readable:
                    self._wake_out.recv(4096)
                if connection in readable:
                    data = connection.recv(1 << 16)
                    if not data:
                        return
                    *lines, buffer = (buffer + data).split(b"\n")
                    for line in lines:
                        if self._take(json.loads(line)):
                            beat_s = 0.0
        except OSError:  # the connection broke: `_run` makes another
            return

    def _flush(self, connection: socket.socket) -> None:
        with self._changed:
            messages = list(self._outgoing)
        if messages:
            connection.sendall(_pack(messages))
        with self._changed:
            for message in messages:
                self._outgoing.popleft()
                if message["type"] in ("record", "shard"):
                    self._recent.append(message)
            if not self._outgoing:
                self._idle.set()

    def _take(self, message: Json) -> bool:
        """Take in one message. Returns whether the coordinator wants a sign of life at once."""
        reason, on_abort = "", None
        with self._changed:
            match message["type"]:
                case "view":
                    self._take_view(message)
                case "hold":
                    self._held = max(self._held, int(message["generation"]))
                case "stop":
                    self.stop_requested = True
                case "release":
                    self._released = True
                case "evicted":
                    self._evicted = str(message.get("reason") or "evicted")
                case "probe":
                    return True
            reason = self._abort_reason()
            on_abort = self._on_abort
            self._changed.notify_all()
        if reason and on_abort is not None:
            on_abort(reason)
        return False

    def _take_view(self, message: Json) -> None:
        view = view_from_wire(message)
        assert view is not None
        if not message["planned"]:
            self._unplanned = max(self._unplanned, view.generation)
        newest = self._newest
        if view.rank_of(self.worker) is not None and (newest is None or view.generation > newest.view.generation):
            host, port = message["store"]
            self._newest = ViewMessage(view, bool(message["planned"]), (host, int(port)))

    def _abort_reason(self) -> str:
        """Why the watched generation cannot go on; "" if it can."""
        if self._evicted:
            return f"evicted: {self._evicted}"
        if self._unplanned > self._watched:
            return f"generation {self._unplanned} replaces {self._watched}"
        if self._watched and self._held >= self._watched:
            return "too few workers"
        return ""


def _pack(messages: list[Json]) -> bytes:
    return b"".join(json.dumps(message, separators=(",", ":")).encode() + b"\n" for message in messages)


def _end(connection: socket.socket) -> None:
    """Close so that what was sent arrives: unread input at a plain close would reset the connection and discard it."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(1.0)
    while connection.recv(1 << 16):
        pass
