"""The worker's client against a scripted coordinator: versions, nonsense, and errors that must not end its thread."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from elastic_moe.control import messages as msg
from elastic_moe.control.codec import decode_from_worker, encode
from elastic_moe.control.view_changes import change_between
from elastic_moe.errors import CoordinatorLost, Evicted
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.lease import Lease
from elastic_moe.runtime.local_state import MAX_RECORDS, LocalState
from elastic_moe.runtime.mailbox import RECENT, Inbox, Outbox
from elastic_moe.types import Member, View
from tests.many_files import many_files

TIMEOUT_S = 60.0


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.005)


def view(generation: int, *workers: str, planned: bool = True) -> msg.ViewMessage:
    members = tuple(Member(worker, "n", i) for i, worker in enumerate(workers))
    return msg.ViewMessage(View(generation, members), planned, "test", ("127.0.0.1", 1))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(TIMEOUT_S)
    yield listener
    listener.close()


@pytest.fixture
def client(listener: socket.socket) -> Iterator[CoordinatorClient]:
    client = CoordinatorClient(listener.getsockname, "secret", "w", "n", os.getpid())
    yield client
    client.close(0.0)


def test_a_coordinator_of_another_version_evicts(listener: socket.socket, client: CoordinatorClient) -> None:
    client.start()
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b'{"type":"welcome"}\n')
        with pytest.raises(Evicted, match="the coordinator speaks version 0"):
            client.wait_view(0)


def test_nonsense_of_a_coordinator_makes_a_new_connection(listener: socket.socket, client: CoordinatorClient) -> None:
    client.start()
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"nonsense\n")
        again, _ = listener.accept()
    with again, again.makefile("rb") as lines:
        assert isinstance(decode_from_worker(lines.readline()), msg.HelloMessage)
        again.sendall(encode(view(1, "w")))
        assert client.wait_view(0) == view(1, "w")


@pytest.mark.parametrize("sent", [(1, 3), (1, 2, 2), (2,), (1, 3, 2)])
def test_a_change_of_a_view_that_the_connection_did_not_bring_makes_a_new_connection(
    listener: socket.socket, client: CoordinatorClient, sent: tuple[int, ...]
) -> None:
    """Lost, repeated, or out of order: no view is formed of it, and the coordinator tells the whole one."""
    views = {1: view(1, "w", *"abcdef"), 2: view(2, "w", *"abcde"), 3: view(3, "w", *"abcd")}
    changes = {number: change_between(views[number - 1], views[number]) for number in (2, 3)}
    client.start()
    first, _ = listener.accept()
    with first:
        for number in sent:
            first.sendall(encode(changes.get(number) or views[number]))
        again, _ = listener.accept()
    with again, again.makefile("rb") as lines:
        hello = decode_from_worker(lines.readline())
        assert isinstance(hello, msg.HelloMessage)
        assert hello.view == {(1, 3): views[1].view, (1, 2, 2): views[2].view, (2,): None}.get(sent, views[1].view)
        again.sendall(encode(views[3]))
        assert client.wait_view(2) == views[3]


def test_a_worker_with_many_open_files_is_served(listener: socket.socket, client: CoordinatorClient) -> None:
    """A thousand peers are a thousand sockets."""
    with many_files():
        client.start()
        connection, _ = listener.accept()
        with connection:
            connection.sendall(encode(view(1, "w")))
            assert client.wait_view(0) == view(1, "w")
            client.close(0.0)


def test_an_unexpected_error_of_find_does_not_end_the_thread(listener: socket.socket) -> None:
    calls: list[int] = []

    def find() -> tuple[str, int]:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("no cluster")
        return listener.getsockname()

    client = CoordinatorClient(find, "secret", "w", "n", os.getpid())
    client.start()
    try:
        connection, _ = listener.accept()
        connection.close()
        assert len(calls) >= 3
    finally:
        client.close(0.0)


def test_an_error_in_the_abort_callback_does_not_end_the_thread(
    listener: socket.socket, client: CoordinatorClient
) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("a fault of the program")

    client.start()
    first, _ = listener.accept()
    with first:
        client.begin_view(view(1, "w").view, broken)
        first.sendall(encode(view(2, "w", planned=False)))
        second, _ = listener.accept()
    with second, second.makefile("rb") as lines:
        hello = decode_from_worker(lines.readline())
        assert isinstance(hello, msg.HelloMessage)
        assert hello.view == view(2, "w").view


def test_the_hello_of_a_new_connection_tells_everything(listener: socket.socket, client: CoordinatorClient) -> None:
    client.start()
    client.ready()
    first, _ = listener.accept()
    with first:
        first.sendall(encode(view(4, "w")))
        message = client.wait_view(0)
        assert message is not None
        client.begin_view(message.view, lambda _: None, lambda: (8, 3))
        client.entered(4, None)
        client.record({"step": 7})
        client.finished()
        until(client.outbox._empty.is_set)
    second, _ = listener.accept()
    with second, second.makefile("rb") as lines:
        hello, *again = [decode_from_worker(lines.readline()) for _ in range(3)]
    pid = os.getpid()
    assert isinstance(hello, msg.HelloMessage)
    assert hello.sources
    assert replace(hello, address=("", 0), sources="") == msg.HelloMessage(
        "secret", "w", "n", pid, ready=True, view=message.view, entered=4, step=7
    )
    assert again == [msg.RecordMessage({"step": 7}), msg.FinishedMessage()]


def test_what_json_cannot_hold_is_refused_where_it_is_sent(client: CoordinatorClient) -> None:
    with pytest.raises(TypeError):
        client.record({"step": 1, "loss": object()})


# --- the inbox --------------------------------------------------------------------------------------------------------


def test_only_an_unplanned_view_a_pause_or_an_eviction_interrupts() -> None:
    reasons: list[str] = []
    inbox = Inbox("w")
    inbox.begin_view(view(2, "w").view, reasons.append)
    for message in (view(3, "w"), msg.PauseMessage(1, "old"), msg.StopMessage(), msg.ReleaseMessage()):
        inbox.receive(message)
    assert reasons == []
    assert inbox.stop_requested
    inbox.receive(view(4, "other", planned=False))  # without this worker, which waits in a collective of generation 2
    assert reasons == ["generation 4 replaces 2"]
    assert inbox.newest == view(3, "w")


def test_a_view_that_is_over_already_is_interrupted_at_once() -> None:
    reasons: list[str] = []
    inbox = Inbox("w")
    inbox.receive(msg.PauseMessage(2, "too few"))
    inbox.begin_view(view(2, "w").view, reasons.append)
    assert reasons == ["too few workers"]


def test_an_older_view_changes_nothing() -> None:
    inbox = Inbox("w")
    inbox.receive(view(3, "w"))
    inbox.receive(view(2, "w"))
    assert inbox.newest == view(3, "w")
    assert inbox.superseded(2)
    assert not inbox.superseded(3)


def test_a_release_and_a_close_end_the_wait() -> None:
    for end in (lambda inbox: inbox.receive(msg.ReleaseMessage()), Inbox.close):
        inbox = Inbox("w")
        results: list[Any] = [1]
        waiting = threading.Thread(target=lambda i=inbox, r=results: r.append(i.wait_view(0)))
        waiting.start()
        end(inbox)
        waiting.join(TIMEOUT_S)
        assert results == [1, None]


def test_a_worker_may_be_released_instead_of_registered() -> None:
    for message, registered in ((msg.ReleaseMessage(), False), (msg.WelcomeMessage(), True)):
        inbox = Inbox("w")
        results: list[Any] = []
        waiting = threading.Thread(target=lambda i=inbox, r=results: r.append(i.wait_welcome(TIMEOUT_S)))
        waiting.start()
        inbox.receive(message)
        waiting.join(TIMEOUT_S)
        assert results == [registered]


# --- the outbox -------------------------------------------------------------------------------------------------------


def test_unconfirmed_records_and_the_newest_shards_are_sent_again_and_nothing_else() -> None:
    outbox = Outbox(lambda: None)
    records = [msg.RecordMessage({"step": step}) for step in range(2 * RECENT)]
    shards = [msg.ShardMessage({"step": step}) for step in range(RECENT + 5)]
    event = msg.EventMessage({"event": "sample"})
    for message in (msg.ReadyMessage(), *records, *shards, event, msg.FinishedMessage()):
        outbox.add(message)
    assert outbox.resent() == b""
    count = len(outbox.waiting())
    outbox.mark_sent(count - 1)
    assert outbox.resent() == b"".join(encode(message) for message in (*records, *shards[5:]))
    assert outbox.waiting() == [encode(msg.FinishedMessage())]
    outbox.forget_recorded(-1)
    outbox.forget_recorded(9)
    outbox.mark_sent(1)
    kept = (*records[10:], *shards[5:], msg.FinishedMessage())
    assert outbox.resent() == b"".join(encode(message) for message in kept)
    outbox.forget_recorded(None)
    assert outbox.resent() == b"".join(encode(message) for message in kept[len(records) - 10 :])


def test_records_are_kept_until_they_are_confirmed_and_in_a_bounded_number() -> None:
    local = LocalState()
    for step in range(1, MAX_RECORDS + 1):
        local.add_record({"step": step})
    local.forget_recorded(-1)
    assert len(local.records) == MAX_RECORDS
    assert local.dropped == 0
    local.add_record({"step": MAX_RECORDS + 1})
    assert (local.records[0]["step"], local.dropped) == (2, 1)
    local.forget_recorded(MAX_RECORDS)
    assert [record["step"] for record in local.records] == [MAX_RECORDS + 1]


def test_waiting_ends_when_all_is_sent_or_nobody_sends() -> None:
    outbox = Outbox(lambda: None)
    outbox.add(msg.ReadyMessage())
    outbox.wait_empty(0.0)
    assert outbox.waiting()
    outbox.abandon()
    outbox.wait_empty(TIMEOUT_S)


def test_a_wait_without_a_coordinator_ends_with_a_sentence() -> None:
    inbox, abort = Inbox("w"), AbortSignal()
    with pytest.raises(CoordinatorLost, match=r"elastic\.hold_s"):
        inbox.wait_view(0, patience_s=0.05)
    with pytest.raises(CoordinatorLost, match=r"elastic\.hold_s"):
        Lease(inbox, 0.01).hold(abort, patience_s=0.05)


def test_a_lease_that_ran_out_is_told_until_a_newer_view_comes() -> None:
    inbox = Inbox("w")
    assert not inbox.lapsed(0.0)
    inbox.receive(view(3, "w"))
    inbox.receive(msg.AliveMessage(time.monotonic()))
    assert not inbox.lapsed(TIMEOUT_S)
    assert inbox.lapsed(-1.0), "it has run out"
    inbox.receive(msg.AliveMessage(time.monotonic()))
    assert inbox.lapsed(TIMEOUT_S), "a coordinator that answers again may not know what became of the view"
    inbox.receive(view(4, "w"))
    assert not inbox.lapsed(TIMEOUT_S)


def test_a_wait_goes_on_while_the_coordinator_answers() -> None:
    inbox = Inbox("w")
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(inbox.wait_view(0, patience_s=1.0)))
    waiting.start()
    for _ in range(30):
        inbox.receive(msg.AliveMessage(time.monotonic()))
        threading.Event().wait(0.1)
    assert waiting.is_alive()
    inbox.receive(msg.ReleaseMessage())
    waiting.join(TIMEOUT_S)
    assert results == [None]


def test_a_hold_is_waited_for_like_a_view_and_is_not_one() -> None:
    inbox = Inbox("w")
    inbox.receive(view(3, "w"))
    inbox.receive(replace(view(4, "w", planned=False), hold=True))
    assert inbox.newest == view(3, "w"), "a new coordinator is not told of a hold"
    waited_for = inbox.wait_view(3)
    assert waited_for is not None
    assert (waited_for.hold, waited_for.view.generation) == (True, 4)
    aborted: list[str] = []
    inbox.begin_view(waited_for.view, aborted.append)
    assert aborted == []
    inbox.receive(replace(view(5, "w", planned=False), hold=True))
    assert aborted == ["the save of generation 5 replaces that of 4"]
    inbox.receive(view(6, "w", planned=False))
    inbox.begin_view(view(6, "w").view, aborted.append)
    assert len(aborted) == 2, "the view ended the save, and no save ends the view"
    assert inbox.wait_view(5) == view(6, "w", planned=False)


def test_how_a_view_was_entered_is_told_again_and_first_until_the_coordinator_has_surely_read_it() -> None:
    outbox = Outbox(lambda: None)
    entered, record = msg.EnteredMessage(4, {"source": "checkpoint", "step": 6}), msg.RecordMessage({"step": 7})
    before_s = time.monotonic()
    for message in (record, entered):
        outbox.add(message)
    outbox.mark_sent(2)
    outbox.forget_entered(before_s)
    assert outbox.resent() == encode(entered) + encode(record)
    outbox.forget_entered(time.monotonic() + 1)
    assert outbox.resent() == encode(record)
    for message in (entered, msg.EnteredMessage(5)):
        outbox.add(message)
    outbox.mark_sent(2)
    assert outbox.resent() == encode(record), "the newest view was entered as others say"
