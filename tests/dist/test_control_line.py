"""The connection to the coordinator for real: one server, clients in threads and in a process that is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_moe.config.schema import ElasticConfig, RunConfig, TrainConfig
from elastic_moe.control.messages import ViewMessage
from elastic_moe.control.requests import DrainRequest, StopRequest
from elastic_moe.coordination.server import ControlServer
from elastic_moe.errors import Evicted, GroupAborted
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.mailbox import RECENT
from tests.patience import until

TOKEN = "secret"
PEER = """
import os, sys, threading
from elastic_moe.runtime.coordinator_client import CoordinatorClient
client = CoordinatorClient(lambda: ("127.0.0.1", int(sys.argv[1])), "secret", "child", "n9", os.getpid(), 0, 0.05)
client.start()
client.ready()
message = client.wait_view(0)
client.begin_view(message.view, lambda reason: None)
client.entered(message.view.generation, {})
threading.Event().wait(60)
"""


class Bench:
    """A server that can be replaced, and clients to it."""

    def __init__(self, target: int, **elastic: Any) -> None:
        values = {"heartbeat_s": 0.05, "heartbeat_timeout_s": 5.0, "join_settle_s": 0.0} | elastic
        self.config = TrainConfig(elastic=ElasticConfig(**values), run=RunConfig(steps=10))
        self.target = target
        self.events: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.clients: dict[str, CoordinatorClient] = {}
        self.aborts: dict[str, list[str]] = {}
        self.address: tuple[str, int] | None = None
        self.server: ControlServer
        self.serve()

    def serve(self) -> None:
        self.server = ControlServer(
            self.config, TOKEN, self.target, on_record=self.records.append, on_event=self.events.append
        )
        self.address = self.server.start()

    def client(self, worker: str, node: str = "n0", token: str = TOKEN) -> CoordinatorClient:
        lease_s = self.config.elastic.lease_s
        client = CoordinatorClient(lambda: self.address, token, worker, node, os.getpid(), 0, 0.05, lease_s)
        client.start()
        client.ready()
        self.clients[worker] = client
        self.aborts[worker] = []
        return client

    def enter(self, workers: list[str], after: int) -> ViewMessage:
        """Let these workers enter the next view."""
        message = None
        for worker in workers:
            message = wait_view(self.clients[worker], after)
            self.clients[worker].begin_view(message.view, self.aborts[worker].append)
            self.clients[worker].entered(message.view.generation, {"step": 0, "source": "peers"})
        assert message is not None
        return message

    def names(self, event: str) -> list[str]:
        return [str(e.get("worker")) for e in self.events if e["event"] == event]

    def close(self) -> None:
        for client in self.clients.values():
            client.close(timeout_s=0.2)
        self.server.close()


def wait_view(client: CoordinatorClient, after: int) -> ViewMessage:
    until(lambda: client.superseded(after) or client.inbox.evicted, f"a view after {after}")
    message = client.wait_view(after)
    assert message is not None
    return message


def cut(client: CoordinatorClient) -> None:
    """Let the connection die as with the process, and keep the client from coming back."""
    client._connection.find = lambda: None
    connection = until(lambda: client._connection.connection, "a connection")
    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    threads = set(threading.enumerate())
    bench = Bench(**getattr(request, "param", {"target": 3}))
    yield bench
    bench.close()
    ours = ("coordinator-client", "control-server")
    assert [t.name for t in threading.enumerate() if t not in threads and t.name in ours] == []


def reset(clients: list[CoordinatorClient]) -> None:
    """Cut the connections of living workers, as a load balancer does; they may connect again."""
    for client in clients:
        connection = until(lambda client=client: client._connection.connection, "a connection")
        connection.shutdown(socket.SHUT_RDWR)


def workers_of(message: ViewMessage) -> list[str]:
    return [m.worker for m in message.view.members]


def test_first_view_and_death(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker)
    first = bench.enter(["a", "b", "c"], 0)
    assert sorted(workers_of(first)) == ["a", "b", "c"]
    assert first.store[1] > 0
    until(lambda: bench.server.status()["entered"], "entered")
    cut(bench.clients["b"])
    after = wait_view(bench.clients["a"], first.view.generation)
    assert workers_of(after) == [w for w in workers_of(first) if w != "b"]
    assert not after.planned
    until(lambda: bench.aborts["a"] and bench.aborts["c"], "both survivors are interrupted")
    assert bench.names("worker_disconnected") == bench.names("worker_lost") == ["b"]


@pytest.mark.parametrize("bench", [{"target": 2, "heartbeat_timeout_s": 0.6, "lease_s": 2.0}], indirect=True)
def test_stopped_process_is_removed_and_taken_in_again(bench: Bench) -> None:
    bench.client("a")
    command = [sys.executable, "-c", PEER, str(bench.address[1] if bench.address else 0)]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    try:
        first = bench.enter(["a"], 0)
        assert set(workers_of(first)) == {"a", "child"}
        until(lambda: bench.server.status()["entered"], "the child enters")
        os.kill(child.pid, signal.SIGSTOP)
        second = wait_view(bench.clients["a"], first.view.generation)
        assert workers_of(second) == ["a"]
        assert bench.names("worker_evicted") == ["child"]
        assert bench.server.status()["evicted"] == [], "it may come back while its lease lasts"
        until(lambda: bench.server.status()["evicted"] == ["child"], "it is given up")
        bench.clients["a"].begin_view(second.view, bench.aborts["a"].append)
        bench.clients["a"].entered(second.view.generation, {"step": 0, "source": "peers"})
        os.kill(child.pid, signal.SIGCONT)
        third = wait_view(bench.clients["a"], second.view.generation)
        assert workers_of(third) == ["a", "child"]
        assert bench.names("worker_readmitted") == ["child"]
        assert bench.server.status()["evicted"] == []
    finally:
        child.kill()
        child.wait()


def test_join_drain_release(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker, f"n{worker}")
    first = bench.enter(["a", "b", "c"], 0)
    bench.server.submit(DrainRequest(node="nb", deadline_s=30))
    draining = bench.enter(["a", "b", "c"], first.view.generation)
    assert draining.planned
    assert [m.worker for m in draining.view.members if m.draining] == ["b"]
    until(lambda: bench.clients["b"].superseded(draining.view.generation), "release")
    assert bench.clients["b"].wait_view(draining.view.generation) is None
    without = bench.enter(["a", "c"], draining.view.generation)
    assert sorted(workers_of(without)) == ["a", "c"]
    bench.client("d", "nd")
    joined = bench.enter(["a", "c", "d"], without.view.generation)
    assert joined.planned
    assert workers_of(joined) == [*workers_of(without), "d"]
    assert not any(bench.aborts.values())


def test_coordinator_restart_does_not_interrupt(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker)
    bench.clients["a"].record({"step": 1, "loss": 1.0})
    first = bench.enter(["a", "b", "c"], 0)
    until(lambda: bench.server.status()["entered"], "entered")
    bench.server.close()
    bench.clients["a"].record({"step": 2, "loss": 0.5})
    bench.serve()
    until(lambda: bench.server.status()["entered"], "the new server knows the view")
    status = bench.server.status()
    assert (status["generation"], status["world_size"], status["phase"]) == (first.view.generation, 3, "running")
    until(lambda: any(r["step"] == 2 for r in bench.records), "the record is sent again")
    assert not any(bench.aborts.values())
    assert not bench.clients["a"].superseded(first.view.generation)
    cut(bench.clients["c"])
    second = wait_view(bench.clients["a"], first.view.generation)
    assert "c" not in workers_of(second)


def test_records_that_nobody_read_come_again_after_a_long_absence() -> None:
    void = socket.create_server(("127.0.0.1", 0))
    address: list[tuple[str, int] | None] = [void.getsockname()]
    client = CoordinatorClient(lambda: address[0], TOKEN, "a", "n0", os.getpid(), 0, 0.05)
    client.start()
    for step in range(1, 6):
        client.record({"step": step})
    connection, _ = void.accept()
    until(client.outbox._empty.is_set, "all is sent")
    address[0] = None
    connection.close()
    void.close()
    steps = list(range(1, 6 + 2 * RECENT))
    for step in steps[5:]:
        client.record({"step": step})
    records: list[dict[str, Any]] = []
    server = ControlServer(TrainConfig(run=RunConfig(steps=10)), TOKEN, 1, on_record=records.append)
    address[0] = server.start()
    try:
        until(lambda: len(records) >= len(steps), "all records")
        assert [record["step"] for record in records] == steps
    finally:
        client.close()
        server.close()


def test_suspicion_alone_reforms_with_everyone(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker)
    first = bench.enter(["a", "b", "c"], 0)
    bench.clients["a"].suspect(first.view.generation, "connection reset")
    second = wait_view(bench.clients["b"], first.view.generation)
    assert workers_of(second) == workers_of(first)
    assert not second.planned
    assert bench.names("worker_lost") == bench.names("worker_evicted") == []


@pytest.mark.parametrize("bench", [{"target": 2, "min_workers": 2}], indirect=True)
def test_pause_and_resume(bench: Bench) -> None:
    bench.client("a")
    bench.client("b")
    first = bench.enter(["a", "b"], 0)
    cut(bench.clients["b"])
    until(lambda: bench.aborts["a"], "the survivor is interrupted")
    assert bench.server.status()["phase"] == "waiting"
    bench.client("c")
    second = wait_view(bench.clients["a"], first.view.generation)
    assert workers_of(second) == ["a", "c"]


def test_stop_and_finish(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker)
    bench.enter(["a", "b", "c"], 0)
    bench.server.submit(StopRequest("Ctrl-C"))
    until(lambda: all(client.stop_requested for client in bench.clients.values()), "stop reaches all")
    for client in bench.clients.values():
        client.finished()
        client.close()
    until(lambda: bench.server.status()["phase"] == "finished", "finished")
    assert bench.names("worker_lost") == []


def test_wrong_token_is_turned_away(bench: Bench) -> None:
    client = bench.client("x", token="guess")
    until(lambda: client.inbox.evicted, "refusal")
    with pytest.raises(Evicted, match="token"):
        client.wait_view(0)
    assert bench.server.status()["workers"] == 0


def test_a_reset_of_all_connections_costs_nobody_its_place(bench: Bench) -> None:
    for worker in ("a", "b", "c"):
        bench.client(worker)
    first = bench.enter(["a", "b", "c"], 0)
    until(lambda: bench.server.status()["entered"], "entered")
    for times in (1, 2, 3):
        reset(list(bench.clients.values()))
        until(lambda times=times: len(bench.names("worker_connected")) == 3 * (times + 1), "all are back")
    threading.Event().wait(1.5)  # longer than the grace of a closed connection
    assert bench.server.status()["generation"] == first.view.generation
    assert not any(bench.aborts.values())
    assert bench.names("worker_lost") == bench.names("worker_evicted") == []


@pytest.mark.parametrize("bench", [{"target": 2, "heartbeat_timeout_s": 0.5, "lease_s": 1.0}], indirect=True)
def test_a_worker_that_is_cut_off_holds_its_vote_until_the_coordinator_is_back(bench: Bench) -> None:
    client = bench.client("a")
    bench.client("b")
    bench.enter(["a", "b"], 0)
    abort, votes = AbortSignal(), list[float]()

    def train() -> None:
        while not abort.is_set:
            with contextlib.suppress(GroupAborted):
                client.lease.hold(abort)
                votes.append(time.monotonic())
            threading.Event().wait(0.01)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        until(lambda: votes, "a vote while the coordinator is heard")
        address, bench.address = bench.address, None
        reset([client])
        lost_s = time.monotonic()
        until(lambda: time.monotonic() - votes[-1] > 1.0, "the votes end")
        assert votes[-1] - lost_s <= 1.1, "the lease counts from the last heartbeat that was answered"
        bench.address = address
        until(lambda: time.monotonic() - votes[-1] < 0.5, "the votes go on")
    finally:
        abort.set("the test ends")
        thread.join()
