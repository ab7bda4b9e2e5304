"""The server's connections: who is admitted, and that neither nonsense nor an error ends the server."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_moe.config.schema import RunConfig, TrainConfig
from elastic_moe.control import messages as msg
from elastic_moe.control.codec import decode_from_coordinator, encode
from elastic_moe.control.requests import StopRequest
from elastic_moe.coordination import gate
from elastic_moe.coordination.server import ControlServer
from elastic_moe.types import Member, View

TIMEOUT_S = 60.0


class Served:
    """A server, and plain sockets to it."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        config = TrainConfig(run=RunConfig(steps=10))
        self.server = ControlServer(config, "secret", 1, on_record=self._on_record, on_event=self.events.append)
        self.address = self.server.start()
        self.sockets: list[socket.socket] = []

    def _on_record(self, record: dict[str, Any]) -> None:
        if record["step"] == 13:
            raise RuntimeError("a fault of the program")
        self.records.append(record)

    def connect(self, *lines: bytes) -> Any:
        """A connection as a file of lines, after it has sent these."""
        connection = socket.create_connection(self.address, timeout=TIMEOUT_S)
        self.sockets.append(connection)
        connection.sendall(b"".join(lines))
        return connection.makefile("rb")

    def close(self) -> None:
        for connection in self.sockets:
            connection.close()
        self.server.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


HELLO = encode(msg.HelloMessage("secret", "w", "n", 1))


def test_a_worker_is_welcomed_with_the_version(served: Served) -> None:
    assert decode_from_coordinator(served.connect(HELLO).readline()) == msg.WelcomeMessage(msg.VERSION)
    assert served.server.status()["workers"] == 1


def test_another_version_is_turned_away_with_a_sentence(served: Served) -> None:
    hello = {"type": "hello", "token": "secret", "version": msg.VERSION + 1, "of_tomorrow": True}
    lines = served.connect(json.dumps(hello).encode() + b"\n").readlines()  # until the server closes
    (evicted,) = [decode_from_coordinator(line) for line in lines]
    assert isinstance(evicted, msg.EvictedMessage)
    assert "install the same release of elastic_moe on every node" in evicted.reason
    assert served.server.status()["workers"] == 0


def test_a_newcomer_with_other_sources_is_turned_away_with_a_sentence(served: Served) -> None:
    def hello(worker: str, sources: str, view: View | None = None) -> bytes:
        return encode(msg.HelloMessage("secret", worker, "n7", 1, sources=sources, view=view))

    first = served.connect(hello("a", "old"))
    assert isinstance(decode_from_coordinator(first.readline()), msg.WelcomeMessage)
    for _ in range(2):
        (line,) = served.connect(hello("b", "new")).readlines()
        evicted = decode_from_coordinator(line)
        assert isinstance(evicted, msg.EvictedMessage)
        assert "the files of elastic_moe on node n7 are not those" in evicted.reason
    told = [event for event in served.events if event["event"] == "worker_set_aside"]
    assert [(event["worker"], event["node"]) for event in told] == [("b", "n7")], "once for each node"
    view = View(4, (Member("c", "n7", 1),))
    for welcome in (hello("a", "old"), hello("d", "old"), hello("e", ""), hello("c", "new", view)):
        assert isinstance(decode_from_coordinator(served.connect(welcome).readline()), msg.WelcomeMessage)


def test_a_newcomer_that_updates_its_state_on_another_device_is_turned_away(served: Served) -> None:
    def hello(worker: str, device: str, view: View | None = None) -> bytes:
        return encode(msg.HelloMessage("secret", worker, "n7", 1, sources="same", updates_on=device, view=view))

    assert isinstance(decode_from_coordinator(served.connect(hello("a", "cuda")).readline()), msg.WelcomeMessage)
    (line,) = served.connect(hello("b", "cpu")).readlines()
    assert decode_from_coordinator(line) == msg.EvictedMessage(
        "node n7 updates its state on cpu, and the run's workers on cuda, which rounds otherwise: with CPUs beside "
        "GPUs set elastic.state_on=host, and with processors of different kinds optim.name=adamw"
    )
    view = View(4, (Member("c", "n7", 1),))
    for welcome in (hello("a", "cuda"), hello("d", "cuda"), hello("e", ""), hello("c", "cpu", view)):
        assert isinstance(decode_from_coordinator(served.connect(welcome).readline()), msg.WelcomeMessage)


def test_a_wrong_token_is_turned_away(served: Served) -> None:
    lines = served.connect(encode(msg.HelloMessage("guess", "w", "n", 1))).readlines()
    assert [decode_from_coordinator(line) for line in lines] == [msg.EvictedMessage("wrong token")]
    assert served.server.status()["workers"] == 0


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"[]\n", b"{}\n", encode(msg.ReadyMessage())])
def test_a_first_line_that_is_no_hello_closes_the_connection(served: Served, line: bytes) -> None:
    assert served.connect(line).readlines() == []
    assert decode_from_coordinator(served.connect(HELLO).readline()) == msg.WelcomeMessage()


def test_nonsense_of_a_worker_counts_as_a_closed_connection(served: Served) -> None:
    assert len(served.connect(HELLO, b'{"type": "heartbeat"}\n').readlines()) == 1  # the welcome, then the end
    assert decode_from_coordinator(served.connect(HELLO).readline()) == msg.WelcomeMessage(), "it may come back"


def test_an_error_in_a_callback_ends_neither_the_connection_nor_the_server(served: Served) -> None:
    lines = [encode(msg.RecordMessage({"step": step})) for step in (12, 13, 14)]
    peer = served.connect(HELLO, *lines, encode(msg.ReadyMessage()))
    messages = [decode_from_coordinator(peer.readline()) for _ in range(2)]
    assert [type(message) for message in messages] == [msg.WelcomeMessage, msg.ViewMessage]
    assert [record["step"] for record in served.records] == [12, 14]
    served.server.submit(StopRequest("enough"))
    assert isinstance(decode_from_coordinator(peer.readline()), msg.StopMessage)


def test_strangers_cannot_take_memory_or_places_from_workers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sockets with the beginning of a line each, more than there are places: a worker still gets in at once."""
    monkeypatch.setattr(gate, "MAX_STRANGERS", 8)
    strangers = [served.connect(b'{"type":"hello","token":') for _ in range(30)]
    assert decode_from_coordinator(served.connect(HELLO).readline()) == msg.WelcomeMessage()
    with contextlib.suppress(ConnectionError):
        assert [stranger.read() for stranger in strangers[:20]] == [b""] * 20  # they made room


@pytest.mark.parametrize("begin", [b'{"type":"hello","token":"', b'{"type":"hello","worker":"', b""])
def test_an_endless_first_line_is_cut_off(served: Served, begin: bytes) -> None:
    """The end of a line never comes. The server closes after a few KiB, while a worker talks with it."""
    peer = served.connect(HELLO)
    stranger = served.connect(begin)
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 1 << 26:
            sent += served.sockets[-1].send(b"x" * (1 << 16))
    assert sent < 1 << 26, "64 MiB of a line without a token were taken"
    assert decode_from_coordinator(peer.readline()) == msg.WelcomeMessage()
    stranger.close()


def test_a_silent_stranger_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "HELLO_TIMEOUT_S", 0.2)
    assert served.connect(HELLO[:-1]).read() == b""  # the right token, and no end of the line


def test_a_long_hello_of_a_worker_is_read(served: Served) -> None:
    """A hello carries the view, which is large in a large run; only what stands before the token is bounded."""
    view = View(3, tuple(Member(f"w{i}" * 8, f"n{i}" * 8, i) for i in range(2000)))
    hello = encode(msg.HelloMessage("secret", "w0" * 8, "n0" * 8, 0, ready=True, view=view))
    assert len(hello) > 10 * gate.HEAD_BYTES
    assert decode_from_coordinator(served.connect(hello).readline()) == msg.WelcomeMessage()
