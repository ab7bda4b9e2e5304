"""The signal that ends a generation. Any thread may set it; all waits of the generation end soon after."""

from __future__ import annotations

import threading
from collections.abc import Callable

from elastic_moe.errors import GroupAborted


class AbortSignal:
    """Tells every waiter of one generation that the generation is over.

    All methods may be called from any thread. The signal is never cleared: the next generation has a signal of its own.

    Attributes:
        reason: why the generation ended; None while it lives.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self.reason: str | None = None

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        """End the generation, and run the callbacks in this thread. The first reason stays; later calls do nothing."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            self._event.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the abort, at most this long. Returns whether the signal is set."""
        return self._event.wait(timeout_s)

    def check(self) -> None:
        """Return while the generation lives.

        Raises:
            GroupAborted: the generation is over.
        """
        if self.is_set:
            raise GroupAborted(self.reason)

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Run `callback` once when the signal is set, in the thread that sets it; at once if it is set already.

        The callback must return quickly and must not raise: the control connection's thread runs it.
        """
        with self._lock:
            if self.reason is None:
                self._callbacks.append(callback)
                return
        callback()

    def remove_callback(self, callback: Callable[[], None]) -> None:
        """Forget a callback; no-op for one that is not registered."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)
