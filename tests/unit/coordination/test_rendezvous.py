"""The rendezvous gives the values of all members to each of them, and nothing to strangers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from elastic_moe.control.codec import encode
from elastic_moe.control.peer_messages import MeetMessage
from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.parallel.collectives.store import GroupStore, Rendezvous

PATIENCE_S = 60.0


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    server = RendezvousServer("127.0.0.1", "secret")
    server.start()
    yield server
    server.close()


def _member(
    server: RendezvousServer, rank: int, world_size: int, token: str = "secret", group: str = "g1"
) -> GroupStore:
    store = GroupStore(Rendezvous("127.0.0.1", server.port, token, 5.0), group, rank, world_size)
    store.set(f"key{rank}", bytes([rank, 255]))
    return store


def _read_all(stores: list[GroupStore]) -> list[list[bytes]]:
    """Every member's values, each member in a thread."""
    found: list[list[bytes]] = [[] for _ in stores]

    def read(index: int) -> None:
        found[index] = [stores[index].get(f"key{rank}") for rank in range(len(stores))]

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return found


def test_all_members_get_the_values_of_all(server: RendezvousServer) -> None:
    stores = [_member(server, rank, 3) for rank in range(3)]
    assert _read_all(stores) == [[bytes([rank, 255]) for rank in range(3)]] * 3
    assert {store.local_host for store in stores} == {"127.0.0.1"}
    for store in stores:
        store.close()


def test_groups_do_not_meet(server: RendezvousServer) -> None:
    others = [_member(server, 0, 2, group="g2/"), _member(server, 1, 2, group="g3/")]
    threads = [threading.Thread(target=_fails, args=(store,), daemon=True) for store in others]
    for thread in threads:
        thread.start()
    stores = [_member(server, rank, 2) for rank in range(2)]
    assert _read_all(stores) == [[b"\x00\xff", b"\x01\xff"]] * 2
    assert all(thread.is_alive() for thread in threads)
    for store in others:
        store.cancel()
    for thread in threads:
        thread.join(PATIENCE_S)
    for store in stores + others:
        store.close()


def _fails(store: GroupStore) -> None:
    with pytest.raises(RuntimeError, match=r"the rendezvous (broke|was closed)"):
        store.get("key9")


def test_cancel_ends_a_wait(server: RendezvousServer) -> None:
    store = _member(server, 0, 2)
    thread = threading.Thread(target=_fails, args=(store,))
    thread.start()
    time.sleep(0.05)  # it waits, or is about to: both must end
    store.cancel()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    store.close()


def test_a_member_whose_connection_ended_has_not_arrived(server: RendezvousServer) -> None:
    gone = _member(server, 0, 2)
    thread = threading.Thread(target=_fails, args=(gone,))
    thread.start()
    gone.cancel()
    thread.join(PATIENCE_S)
    gone.close()
    stores = [_member(server, rank, 2) for rank in range(2)]
    assert _read_all(stores) == [[b"\x00\xff", b"\x01\xff"]] * 2
    for store in stores:
        store.close()


def test_a_stranger_neither_meets_nor_disturbs(server: RendezvousServer) -> None:
    guess = _member(server, 0, 2, token="guess")
    _fails(guess)
    guess.close()
    nonsense = [
        b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 5000, b'{"type":"meet","token":"secret"}\n',
        encode(MeetMessage("secret", "g1", 7, 2, ())), encode(MeetMessage("secret", "g1", -1, 2, ())),
    ]  # fmt: skip
    for line in nonsense:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
            connection.sendall(line)
            assert connection.recv(100) == b""
    stores = [_member(server, rank, 2) for rank in range(2)]
    assert _read_all(stores) == [[b"\x00\xff", b"\x01\xff"]] * 2
    for store in stores:
        store.close()


def test_the_token_is_in_no_text_of_a_rendezvous() -> None:
    assert "secret" not in repr(Rendezvous("h", 1, "secret", 1.0))
    assert "secret" not in repr(MeetMessage("secret", "g", 0, 1, ()))
