"""A thread that listens on one address and serves its connections in an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from elastic_moe.coordination.gate import LineReader

JOIN_TIMEOUT_S = 5.0  # for the thread at the end

Serve = Callable[[LineReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
logger = logging.getLogger(__name__)


class ListenerThread:
    """Listens from `start` to `close`, on any free port.

    Args:
        name: of the thread.
        host: address to listen on.
        serve: serves one connection; when it returns, or raises OSError, TimeoutError or ValueError, the connection is
            closed.
        tick: called every `tick_s` seconds in the thread; it must not raise.
        tick_s: seconds between two calls of `tick`.

    Attributes:
        port: on which it listens, after `start`.
        closing: it has been asked to end.
    """

    def __init__(
        self, name: str, host: str, serve: Serve, tick: Callable[[], None] = lambda: None, tick_s: float | None = None
    ) -> None:
        self.port, self.closing = 0, False
        self._name, self._host, self._serve, self._tick, self._tick_s = name, host, serve, tick, tick_s
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to listen.

        Raises:
            RuntimeError: it cannot listen on its host.
        """
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise RuntimeError(f"the {self._name} cannot listen on {self._host}") from self._error

    def call(self, action: Callable[[], object]) -> None:
        """Call `action` in the thread, soon; safe from any thread. After `close` it has no effect."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine in the thread until `close`. Called in the thread."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Stop listening, cut all connections, and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(JOIN_TIMEOUT_S)
        elif not self._loop.is_closed():  # it was never started
            self._loop.close()

    # --- the thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        try:
            server = await asyncio.start_server(self._connected, self._host, 0)
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        while not self._stopping.is_set():
            self._tick()
            try:
                await asyncio.wait_for(self._stopping.wait(), self._tick_s)
            except TimeoutError:
                continue
        self.closing = True
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(LineReader(reader), writer)
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("%s: %r", self._name, error)
        finally:
            self._tasks.discard(task)
            writer.close()
