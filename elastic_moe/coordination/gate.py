"""Who may talk to the coordinator: a connection shows the run's token first, and what it may cost before is bounded.

A stranger has a few KiB of one line, a few seconds, and one of a bounded number of places. When these are taken, the
connection that has waited longest goes: whoever has the token shows it at once, so no flood keeps a worker out.
"""

from __future__ import annotations

import asyncio
import hmac

from elastic_moe.control.codec import token_of

HEAD_BYTES = 4096  # of the first line, in which the token must stand
LINE_BYTES = 1 << 24  # of a message of a peer that has shown the token
HELLO_TIMEOUT_S = 10.0
MAX_STRANGERS = 256
CHUNK_BYTES = 1 << 16


class WrongToken(ValueError):
    """The first message has another token."""


class LineReader:
    """The lines of a connection, of at most `LINE_BYTES` each."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader, self._buffer = reader, bytearray()

    async def head(self, size: int) -> bytes:
        """The first bytes of the next line: `size` of them, or the whole line if it is shorter. They stay unread."""
        while b"\n" not in self._buffer and len(self._buffer) < size:
            data = await self._reader.read(size)
            if not data:
                break
            self._buffer += data
        return bytes(self._buffer[:size]).partition(b"\n")[0]

    async def line(self) -> bytes:
        """The next line with its line break; b"" at the end of the connection, where half a line is no line.

        Raises:
            ValueError: the line is too long.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LINE_BYTES:
                raise ValueError(f"a message has more than {LINE_BYTES} bytes")
            data = await self._reader.read(CHUNK_BYTES)
            if not data:
                return b""
            self._buffer += data
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line


class Gate:
    """Admits the connections of one server.

    Args:
        token: shared secret of the run.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # in order of arrival

    async def admit(self, lines: LineReader, writer: asyncio.StreamWriter) -> bytes:
        """The first line of a connection whose peer has the token.

        Raises:
            WrongToken: it has another one.
            TimeoutError: the line did not arrive in time.
            OSError: the connection broke, or others needed its place.
            ValueError: there is no token, or the line is too long.
        """
        self._strangers[writer] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                token = token_of(await lines.head(HEAD_BYTES))
                if token is None:
                    raise ValueError("the first message has no token")
                if not hmac.compare_digest(token.encode(errors="replace"), self._token):
                    raise WrongToken("wrong token")
                return await lines.line()
        finally:
            self._strangers.pop(writer, None)
