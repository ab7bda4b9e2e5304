"""The mail between a worker's main thread and the thread that talks to the coordinator.

`Inbox` holds the newest state that the coordinator announced. `Outbox` holds the messages that must still be sent, and
those that may have to be sent again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from elastic_moe.control.codec import encode
from elastic_moe.control.messages import (
    AliveMessage,
    CoordinatorMessage,
    EnteredMessage,
    EvictedMessage,
    FinishedMessage,
    PauseMessage,
    RecordMessage,
    ReleaseMessage,
    SaveMessage,
    ShardMessage,
    StopMessage,
    SuspectMessage,
    ViewMessage,
    WelcomeMessage,
    WorkerMessage,
)
from elastic_moe.errors import CoordinatorLost, Evicted
from elastic_moe.types import View

SLICE_S = 1.0  # one wait for a view
RECENT = 64  # shard reports sent again after the coordinator was lost
MAX_SENT = 4096  # records kept after they were sent, if the coordinator confirms none


class Inbox:
    """Everything that the coordinator has told one worker.

    Args:
        worker: the worker's id.

    Attributes:
        newest: newest view with this worker in it, or None.
        hold: newest hold in which this worker is to save its state, or None.
        evicted: why the worker is no member any more; "" while it may be one.
        stop_requested: the run should end after the step in flight.
        save_step: the coordinator wants a checkpoint of this step, or of a later one; -1 if of none.
        generation: generation that the main thread lives in; 0 before the first.
        heard_s: monotonic time at which the newest heartbeat was sent that the coordinator has answered.
        recorded: the records of all steps up to this one are in the run's files; -1 if that is not known.
        welcome: the newest one; None before the first.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._changed = threading.Condition()
        self.newest: ViewMessage | None = None
        self.hold: ViewMessage | None = None
        self.evicted = ""
        self.stop_requested = False
        self.save_step = -1
        self.generation = 0
        self.heard_s = -math.inf
        self.recorded = -1
        self.welcome: WelcomeMessage | None = None
        self._made_s = time.monotonic()
        self._unplanned = 0  # newest generation that must not wait for a step boundary
        self._paused = 0  # newest generation that was paused
        self._released = False
        self._lapsed = 0  # view in which the lease has run out
        self._closed = False
        self._on_abort: Callable[[str], None] | None = None

    # --- the main thread's side ---

    def superseded(self, generation: int) -> bool:
        """Whether a newer view is here, or this worker was released."""
        newest = self.newest
        return self._released or (newest is not None and newest.view.generation > generation)

    def wait_view(self, after_generation: int, patience_s: float = math.inf) -> ViewMessage | None:
        """Wait for a view or a hold newer than `after_generation`.

        Returns None if the worker is released or the inbox closed.

        Raises:
            Evicted: the coordinator no longer counts this worker as a member.
            CoordinatorLost: it was not heard for `patience_s`.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: self.evicted or self._closed or self._released or self._next(after_generation), SLICE_S
            ):
                self.check_heard(patience_s)
            if self.evicted:
                raise Evicted(self.evicted)
            return None if self._released or self._closed else self._next(after_generation)

    def wait_welcome(self, patience_s: float) -> bool:
        """Wait until the coordinator has registered this worker.

        Returns whether it has: it releases one that comes when the run is over, or from a node that drains.

        Raises:
            Evicted, CoordinatorLost: as `wait_view`.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: self.evicted or self._closed or self._released or self.welcome, SLICE_S
            ):
                self.check_heard(patience_s)
            if self.evicted:
                raise Evicted(self.evicted)
            return self.welcome is not None

    def check_heard(self, patience_s: float) -> None:
        """Return unless the coordinator was not heard for too long.

        Raises:
            CoordinatorLost: it was not.
        """
        if time.monotonic() - max(self.heard_s, self._made_s) > patience_s:
            raise CoordinatorLost(
                f"the coordinator was not heard for {patience_s:g} s (elastic.hold_s), so this worker ends; a resume "
                "goes on from the newest checkpoint"
            )

    def lapsed(self, lease_s: float) -> bool:
        """Whether the lease has run out since the newest view came, so that another view may have followed it."""
        if self.newest is None:
            return False
        if time.monotonic() - max(self.heard_s, self._made_s) > lease_s:
            self._lapsed = self.newest.view.generation
        return self._lapsed == self.newest.view.generation

    def _next(self, after_generation: int) -> ViewMessage | None:
        """The newest view or hold after this generation."""
        found = [m for m in (self.newest, self.hold) if m is not None and m.view.generation > after_generation]
        return max(found, key=lambda message: message.view.generation, default=None)

    def begin_view(self, view: View, on_abort: Callable[[str], None]) -> None:
        """From now on live in `view`. `on_abort` is called, at once or by `receive`, when the view is over early."""
        with self._changed:
            self.generation, self._on_abort = view.generation, on_abort
            reason = self._abort_reason()
        if reason:
            on_abort(reason)

    def close(self) -> None:
        """End every wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- the connection thread's side ---

    def receive(self, message: CoordinatorMessage) -> None:
        """Take in a message, and interrupt the main thread if its generation is over."""
        if isinstance(message, AliveMessage):
            self.heard_s = max(self.heard_s, message.sent_s)
            if message.recorded >= 0:
                self.recorded = message.recorded
            return
        with self._changed:
            match message:
                case WelcomeMessage():
                    self.welcome = message
                case ViewMessage(view, hold=True):
                    self.hold = message
                case ViewMessage(view, planned):
                    if not planned:
                        self._unplanned = max(self._unplanned, view.generation)
                    newest = self.newest
                    newer = newest is None or view.generation > newest.view.generation
                    if view.rank_of(self._worker) is not None and newer:
                        self.newest = message
                case PauseMessage(generation):
                    self._paused = max(self._paused, generation)
                case SaveMessage(step):
                    self.save_step = max(self.save_step, step)
                case StopMessage():
                    self.stop_requested = True
                case ReleaseMessage():
                    self._released = True
                case EvictedMessage(reason):
                    self.evicted = reason or "evicted"
                case _:
                    return
            abort_reason, on_abort = self._abort_reason(), self._on_abort
            self._changed.notify_all()
        if abort_reason and on_abort is not None:
            on_abort(abort_reason)

    def _abort_reason(self) -> str:
        """Why the present generation cannot go on; "" if it can."""
        if self.evicted:
            return f"evicted: {self.evicted}"
        if self._unplanned > self.generation:
            return f"generation {self._unplanned} replaces {self.generation}"
        if self._released and self.hold is not None and self.hold.view.generation == self.generation:
            return "released"
        if self.generation and self._paused >= self.generation:
            return "too few workers"
        if self.hold is not None and self.hold.view.generation > self.generation > 0:
            return f"the save of generation {self.hold.view.generation} replaces that of {self.generation}"
        return ""


class Outbox:
    """Messages to the coordinator, in order.

    A coordinator that died may never have read its last messages. Records are therefore kept after they were sent,
    until the coordinator says that they are in the run's files. The last shard reports are kept too, and so are the
    worker's `finished` and its last `suspect`, and how it entered a view, until a later heartbeat was answered. The
    latter comes first, since it may take the records of later steps away. The receiver drops those that it has.

    Args:
        wake: called after a message was added.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[tuple[WorkerMessage, bytes]] = deque()
        self._records: deque[tuple[int, bytes]] = deque(maxlen=MAX_SENT)  # (step, line)
        self._shards: deque[bytes] = deque(maxlen=RECENT)
        self._last: dict[type, bytes] = {}
        self._entered = b""  # the line, and when it was sent
        self._entered_s = 0.0
        self._empty = threading.Event()
        self._empty.set()

    def add(self, message: WorkerMessage) -> None:
        """Add a message.

        Raises:
            TypeError: the message holds something that JSON does not have.
        """
        line = encode(message)
        with self._lock:
            self._waiting.append((message, line))
            self._empty.clear()
        self._wake()

    def wait_empty(self, timeout_s: float) -> None:
        """Wait until everything is sent, or nobody sends any more, or the time is over."""
        self._empty.wait(timeout_s)

    # --- the connection thread's side ---

    def resent(self) -> bytes:
        """Messages that were sent on an older connection and may have been lost with it."""
        with self._lock:
            records = [line for _, line in self._records]
            return b"".join([self._entered, *records, *self._shards, *self._last.values()])

    def waiting(self) -> list[bytes]:
        """Messages that were not sent yet."""
        with self._lock:
            return [line for _, line in self._waiting]

    def mark_sent(self, count: int) -> None:
        """The oldest `count` messages are sent."""
        with self._lock:
            for _ in range(count):
                message, line = self._waiting.popleft()
                if isinstance(message, RecordMessage):
                    self._records.append((message.record["step"], line))
                elif isinstance(message, ShardMessage):
                    self._shards.append(line)
                elif isinstance(message, FinishedMessage | SuspectMessage):
                    self._last[type(message)] = line
                elif isinstance(message, EnteredMessage):
                    self._entered = b"" if message.info is None else line  # a hello tells the rest
                    self._entered_s = time.monotonic()
            if not self._waiting:
                self._empty.set()

    def forget_recorded(self, step: int | None) -> None:
        """The records of all steps up to this one (None: all that were sent) need not be sent again."""
        with self._lock:
            kept = [] if step is None else [(at, line) for at, line in self._records if at > step]
            if len(kept) < len(self._records):
                self._records = deque(kept, maxlen=MAX_SENT)

    def forget_entered(self, heard_s: float) -> None:
        """The coordinator has read all that was sent before this time."""
        with self._lock:
            if heard_s > self._entered_s:
                self._entered = b""

    def abandon(self) -> None:
        """Nobody sends any more: end every wait."""
        self._empty.set()
