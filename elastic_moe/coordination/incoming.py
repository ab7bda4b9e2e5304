"""What comes on a connection of the file server: little of a stranger; files in chunks from whoever has the token."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

HELLO_TIMEOUT_S = 10.0  # for the first request of a connection
HEAD_BYTES = 1 << 14  # of that request, in which the token must stand
READ_BYTES = 1 << 20  # of a file that comes; each of a thousand connections may need a buffer
_LINE_BYTES = 64  # of the length of a chunk


class Incoming(socket.SocketIO):
    """What comes on a connection. A stranger has few bytes and little time, and then seems to have hung up.

    Attributes:
        known: the peer has shown the token.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "rb")
        self.known = False
        self._connection, self._left, self._until_s = connection, HEAD_BYTES, time.monotonic() + HELLO_TIMEOUT_S

    def readinto(self, b: Any) -> int | None:
        if self.known:
            return super().readinto(b)
        left_s = self._until_s - time.monotonic()
        if left_s <= 0 or not self._left:
            return 0
        self._connection.settimeout(left_s)
        try:
            count = super().readinto(memoryview(b)[: self._left]) or 0
        except TimeoutError:
            return 0
        self._left -= count
        return count


def chunks(content: BufferedIOBase) -> Iterator[memoryview]:
    """The content of a request, in pieces as they arrive.

    Raises:
        ConnectionError: it ended early, so the file is not published.
    """
    buffer = memoryview(bytearray(READ_BYTES))
    while left := _length(content):
        while left:
            count = content.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise ConnectionError("the content ended early")
            left -= count
            yield buffer[:count]
        _line(content)
    _line(content)


def _length(content: BufferedIOBase) -> int:
    line = _line(content)
    if not re.fullmatch(rb"[0-9A-Fa-f]+", line):
        raise ConnectionError("the content is damaged")
    return int(line, 16)


def _line(content: BufferedIOBase) -> bytes:
    line = content.readline(_LINE_BYTES)
    if not line.endswith(b"\n"):
        raise ConnectionError("the content ended early")
    return line.strip()
