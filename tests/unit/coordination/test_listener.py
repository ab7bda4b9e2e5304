"""The thread that listens: it leaves no socket and no task behind, whatever its peers do while it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading

import pytest

from elastic_moe.coordination.gate import LineReader
from elastic_moe.coordination.listener import ListenerThread, Serve


async def _flood(lines: LineReader, writer: asyncio.StreamWriter) -> None:
    """Send more than the buffers of both sides hold, and wait for a line."""
    writer.write(b"x" * (1 << 24))
    await lines.line()


async def _wait(lines: LineReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x")
    await lines.line()


def _peer(listener: ListenerThread) -> socket.socket:
    """A connection that is served."""
    peer = socket.create_connection(("127.0.0.1", listener.port), timeout=60.0)
    assert peer.recv(1) == b"x"
    return peer


@pytest.mark.parametrize("serve", [_flood, _wait])
def test_close_cuts_every_connection(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    listener = ListenerThread("listener", "127.0.0.1", serve)
    listener.start()
    gone, peers = [[_peer(listener) for _ in range(4)] for _ in range(2)]
    for peer in gone:
        peer.close()
    listener.close()
    for peer in peers:
        with peer, contextlib.suppress(ConnectionResetError):
            while peer.recv(1 << 16):
                pass
    gc.collect()
    assert not caplog.records, "no task was destroyed while it was pending"


@pytest.mark.filterwarnings("error")
def test_connections_that_come_while_it_ends_are_cut_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(10):
        listener = ListenerThread("listener", "127.0.0.1", _wait)
        listener.start()
        ended = threading.Event()

        def knock(listener: ListenerThread = listener, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", listener.port), timeout=1.0).close()

        peers = [threading.Thread(target=knock) for _ in range(3)]
        for peer in peers:
            peer.start()
        listener.close()
        ended.set()
        for peer in peers:
            peer.join()
    gc.collect()
    assert not caplog.records
