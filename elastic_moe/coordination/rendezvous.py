"""Where the groups of a generation form: every member leaves its values, and gets those of all when all have arrived.

The server is in the coordinator's process, because rank 0's death must not take it along, and has a thread of its own,
so that a large group that forms delays no heartbeat. It serves whoever shows the run's token. A group exists from its
first member's arrival until its values are handed out; a member whose connection ends before has not arrived.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, field

from elastic_moe.control.codec import decode_rendezvous, encode
from elastic_moe.control.messages import MeetMessage, MetMessage
from elastic_moe.coordination.gate import Gate, LineReader

JOIN_TIMEOUT_S = 5.0  # for the server's thread at the end

logger = logging.getLogger(__name__)


@dataclass
class _Gathering:
    """The members of one group that have arrived: rank -> its message and its connection."""

    world_size: int
    members: dict[int, tuple[MeetMessage, asyncio.StreamWriter]] = field(
        default_factory=dict[int, tuple[MeetMessage, asyncio.StreamWriter]]
    )


class RendezvousServer:
    """Serves one run, in a thread of its own.

    Args:
        host: address to listen on.
        token: shared secret of the run.

    Attributes:
        port: on which it listens, after `start`.
    """

    def __init__(self, host: str, token: str) -> None:
        self._host, self._gate = host, Gate(token)
        self.port = 0
        self._gatherings: dict[str, _Gathering] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)

    def start(self) -> None:
        """Begin to listen.

        Raises:
            RuntimeError: the server cannot listen on its host.
        """
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise RuntimeError(f"the rendezvous cannot listen on {self._host}") from self._error

    def close(self) -> None:
        """Stop serving and cut all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(JOIN_TIMEOUT_S)

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
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        await self._stopping.wait()
        server.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One member's connection, from its first message to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        lines = LineReader(reader)
        try:
            line = await self._gate.admit(lines, writer)
            while line:
                message = decode_rendezvous(line)
                if not isinstance(message, MeetMessage):
                    raise ValueError("a member of a group sends no answer")
                self._arrived(message, writer)
                line = await lines.line()
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("rendezvous: %r", error)
        finally:
            self._handlers.discard(task)
            self._gone(writer)
            writer.close()

    def _arrived(self, message: MeetMessage, writer: asyncio.StreamWriter) -> None:
        """Take a member in; hand the values out if it is the last one."""
        if not 0 <= message.rank < message.world_size:
            raise ValueError(f"rank {message.rank} of {message.world_size} members")
        gathering = self._gatherings.setdefault(message.group, _Gathering(message.world_size))
        if gathering.world_size != message.world_size:
            raise ValueError(f"group {message.group} has {gathering.world_size} members, not {message.world_size}")
        if message.rank in gathering.members:
            gathering.members[message.rank][1].close()  # an older connection of the same member
        gathering.members[message.rank] = message, writer
        if len(gathering.members) < gathering.world_size:
            return
        del self._gatherings[message.group]
        arrived = gathering.members.values()
        answer = encode(MetMessage(tuple(pair for meet, _ in arrived for pair in meet.values)))
        for _, member in arrived:
            member.write(answer)

    def _gone(self, writer: asyncio.StreamWriter) -> None:
        """Forget the arrival of a member whose connection has ended."""
        for group, gathering in list(self._gatherings.items()):
            gathering.members = {rank: one for rank, one in gathering.members.items() if one[1] is not writer}
            if not gathering.members:
                del self._gatherings[group]
