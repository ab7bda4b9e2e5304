"""Links over real sockets: reached both ways, refused, silent, strangers, and a thousand peers at once."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator

import pytest

from elastic_moe.control.codec import encode
from elastic_moe.control.messages import CheckLinksMessage, LinksMessage
from elastic_moe.control.peer_messages import LinkMessage
from elastic_moe.runtime import links as links_module
from elastic_moe.runtime.links import LinkProber, link_token
from elastic_moe.types import Member
from tests.patience import PATIENCE_S


class Prober:
    """One worker's links, with the answers to checks."""

    def __init__(self, worker: str, token: str = "secret") -> None:
        self.answers: queue.Queue[LinksMessage] = queue.Queue()
        self.worker = worker
        self.prober = LinkProber(token, worker, self.answers.put)
        self.prober.open("127.0.0.1")

    @property
    def member(self) -> Member:
        return Member(self.worker, "n", 1, address=self.prober.address)

    def check(self, *peers: Member) -> LinksMessage:
        self.prober.check(CheckLinksMessage(7, peers))
        return self.answers.get(timeout=PATIENCE_S)


@pytest.fixture
def pair() -> Iterator[tuple[Prober, Prober]]:
    probers = Prober("a"), Prober("b")
    yield probers
    for prober in probers:
        prober.prober.close()


def test_a_living_worker_is_reached_and_a_dead_one_refuses(pair: tuple[Prober, Prober]) -> None:
    a, b = pair
    members = (a.member, b.member)
    assert a.check(*members) == LinksMessage(7, ("b",), (), ())
    b.prober.close()
    assert a.check(*members) == LinksMessage(7, (), (), ("b",))


def test_another_worker_at_the_address_is_not_the_one(pair: tuple[Prober, Prober]) -> None:
    a, b = pair
    assert a.check(Member("c", "n", 1, address=b.prober.address)) == LinksMessage(7, (), ("c",), ())


def test_a_worker_of_another_run_is_not_reached(pair: tuple[Prober, Prober]) -> None:
    a, _ = pair
    other = Prober("c", token="of another run")
    assert a.check(other.member) == LinksMessage(7, (), ("c",), ())
    other.prober.close()


def test_a_socket_that_takes_connections_and_says_nothing_is_silent(
    pair: tuple[Prober, Prober], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "LINK_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        assert pair[0].check(Member("c", "n", 1, address=stopped.getsockname())) == LinksMessage(7, (), ("c",), ())


def test_a_link_must_hold_both_ways(pair: tuple[Prober, Prober]) -> None:
    """b cannot connect back to the address that a names, as behind a firewall."""
    a, b = pair
    address = a.prober.address
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()
    a.prober.address = closed
    assert a.check(b.member).silent == ("b",)
    a.prober.address = address
    assert a.check(b.member).reached == ("b",)


def test_strangers_get_no_answer_and_harm_nobody(pair: tuple[Prober, Prober]) -> None:
    a, b = pair
    wrong = encode(LinkMessage(link_token("secret", "another"), ("", 0), "a"))
    for line in (b"GET / HTTP/1.1\r\n\r\n", wrong, b"\x00" * 9000, b'{"type":"linked","token":"x"}\n'):
        with socket.create_connection(b.prober.address, PATIENCE_S) as stranger:
            stranger.sendall(line)
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                continue
    assert a.check(b.member).reached == ("b",)


def test_a_thousand_peers_are_tried_in_one_check(pair: tuple[Prober, Prober]) -> None:
    a, b = pair
    gone = Member("gone", "n", 1, address=("127.0.0.1", 1))
    peers = [Member("b", "n", 1, address=b.prober.address)]
    peers += [Member(f"g{i}", "n", 1, address=gone.address) for i in range(1023)]
    answer = a.check(*peers)
    assert answer.reached == ("b",)
    assert len(answer.refused) == 1023


def test_links_end_while_a_check_is_under_way(pair: tuple[Prober, Prober]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        pair[0].prober.check(CheckLinksMessage(1, (Member("c", "n", 1, address=stopped.getsockname()),)))
        pair[0].prober.close()
    assert pair[0].prober.address == ("", 0)


def test_a_worker_that_does_not_listen_answers_that_it_knows_nothing() -> None:
    answers: list[LinksMessage] = []
    prober = LinkProber("secret", "a", answers.append)
    prober.open("192.0.2.1")  # no address of this machine
    prober.check(CheckLinksMessage(3, ()))
    assert answers == [LinksMessage(3, (), (), ())]
