"""A thread that listens on one address and serves its connections in an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakSet

from elastic_moe.coordination.gate import LineReader

START_TIMEOUT_S = 60.0  # until the thread listens
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
        self._writers: WeakSet[asyncio.StreamWriter] = WeakSet()  # an open connection keeps its own alive
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
        if not self._started.wait(START_TIMEOUT_S):
            raise RuntimeError(f"the {self._name} does not listen after {START_TIMEOUT_S:g} s")
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
            server = await asyncio.start_server(self._accept, self._host, 0)
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
        for listening in server.sockets:  # a server that is closed would drop a connection that it is just accepting
            self._loop.remove_reader(listening.fileno())
        await self._cut()
        server.close()

    async def _cut(self) -> None:
        """End all that goes on in the loop, and close every socket. What is just being accepted comes through first."""
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks & self._tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # in which the loop closes the sockets

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.spawn(self._connected(reader, writer))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its end."""
        try:
            await self._serve(LineReader(reader), writer)
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("%s: %r", self._name, error)
        finally:
            writer.close()
