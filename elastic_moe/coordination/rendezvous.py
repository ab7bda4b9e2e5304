"""Where the groups of a generation form: every member leaves its values, and gets those of all when all have arrived.

The server is in the coordinator's process, because rank 0's death must not take it along, and has a thread of its own,
so that a large group that forms delays no heartbeat. It serves whoever shows the run's token. A group exists from its
first member's arrival until its values are handed out; a member whose connection ends before has not arrived.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from elastic_moe.control.codec import decode_rendezvous, encode
from elastic_moe.control.peer_messages import MeetMessage, MetMessage
from elastic_moe.coordination.gate import Gate, LineReader
from elastic_moe.coordination.listener import ListenerThread


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
    """

    def __init__(self, host: str, token: str) -> None:
        self._gate = Gate(token)
        self._gatherings: dict[str, _Gathering] = {}
        self._listener = ListenerThread("rendezvous", host, self._serve)

    @property
    def port(self) -> int:
        """On which it listens, after `start`."""
        return self._listener.port

    def start(self) -> None:
        """Begin to listen.

        Raises:
            RuntimeError: the server cannot listen on its host.
        """
        self._listener.start()

    def close(self) -> None:
        """Stop serving and cut all connections."""
        self._listener.close()

    # --- the server's thread ---

    async def _serve(self, lines: LineReader, writer: asyncio.StreamWriter) -> None:
        """One member's connection, from its first message to its end."""
        try:
            line = await self._gate.admit(lines, writer)
            while line:
                message = decode_rendezvous(line)
                if not isinstance(message, MeetMessage):
                    raise ValueError("a member of a group sends no answer")
                self._arrived(message, writer)
                line = await lines.line()
        finally:
            self._gone(writer)

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
