"""The coordinator's server: one TCP connection per worker, in a thread of its own. It uses no Ray.

`coordination/membership.py` decides in the same loop turn in which a connection closes, so a death is answered within
milliseconds. The tick serves conditions that only time reveals, such as silence. The rendezvous of groups that form has
a server of its own beside this one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control import events as ev
from elastic_moe.control import messages as msg
from elastic_moe.control.codec import VersionMismatch, decode_from_worker, encode
from elastic_moe.control.message_events import event_of_request
from elastic_moe.coordination.gate import Gate, LineReader, WrongToken
from elastic_moe.coordination.membership import Membership, RunStatus, Sink
from elastic_moe.coordination.rendezvous import RendezvousServer

TICK_S = 0.1
JOIN_TIMEOUT_S = 5.0  # for the server's thread at the end

logger = logging.getLogger(__name__)


class ControlServer:
    """Serves one run.

    Args:
        config: the run's configuration.
        token: shared secret of the run; a worker with another token is turned away.
        target: workers the run starts with.
        host: address to listen on, and under which workers reach this process.
        on_record, on_event, on_shard: called in the server's thread, as `Membership` describes them.
        restarted: another coordinator of this run was here before.
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
        self._host, self._gate = host, Gate(token)
        self._membership = Membership(config, target, self, on_record, on_event, on_shard, restarted)
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._rendezvous = RendezvousServer(host, token)
        self._address: tuple[str, int] = (host, 0)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="control-server", daemon=True)

    # --- called from any thread ---

    def start(self) -> tuple[str, int]:
        """Start serving. Returns the address that workers connect to.

        Raises:
            RuntimeError: the server cannot listen on its host.
        """
        self._rendezvous.start()
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise RuntimeError(f"the control server cannot listen on {self._host}") from self._error
        return self._address

    def submit(self, request: msg.Request) -> None:
        """Take a request; it is answered in the server's thread."""
        event = event_of_request(request)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._guard, lambda: self._membership.observe(event))

    def status(self) -> RunStatus:
        """The state of the run."""
        return self._membership.status()

    def close(self) -> None:
        """Stop serving and cut all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(JOIN_TIMEOUT_S)
        self._rendezvous.close()

    # --- called by the membership, in the server's thread ---

    @property
    def store_address(self) -> tuple[str, int]:
        return self._host, self._rendezvous.port

    def send(self, workers: Sequence[str], message: msg.CoordinatorMessage) -> None:
        line = encode(message)
        for worker in workers:
            writer = self._writers.get(worker)
            if writer is not None and not writer.is_closing():
                writer.write(line)

    def disconnect(self, worker: str) -> None:
        if (writer := self._writers.pop(worker, None)) is not None:
            writer.close()

    # --- the server's thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        try:
            server = await asyncio.start_server(self._serve, self._host, 0)
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self._address = (self._host, server.sockets[0].getsockname()[1])
        self._started.set()
        while not self._stopping.is_set():
            self._guard(lambda: self._membership.observe(ev.Tick()))
            try:
                await asyncio.wait_for(self._stopping.wait(), TICK_S)
            except TimeoutError:
                continue
        server.close()
        for writer in list(self._writers.values()):
            writer.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first message to its end. Nonsense and silence at the start end it too."""
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        worker, lines = "", LineReader(reader)
        try:
            hello = await self._admitted(lines, writer)
            if hello is None:
                return
            worker = hello.worker
            self._writers[worker] = writer
            self._receive(worker, hello)
            while line := await lines.line():
                self._receive(worker, decode_from_worker(line))
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("connection of %s: %r", worker or "an unknown peer", error)
        finally:
            self._handlers.discard(task)
            writer.close()
            if worker and self._writers.get(worker) is writer:
                del self._writers[worker]
                if not self._stopping.is_set():
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
        return hello

    def _receive(self, worker: str, message: msg.WorkerMessage) -> None:
        self._guard(lambda: self._membership.receive(worker, message))

    def _guard(self, action: Callable[[], None]) -> None:
        """Do one thing in the server's thread. The thread must outlive an error in it."""
        try:
            action()
        except Exception:
            logger.exception("the coordinator could not take in an event")
