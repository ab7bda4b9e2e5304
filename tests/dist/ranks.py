"""Ranks as processes. The test plays the coordinator: it hosts the store, sets aborts and publishes views.

A rank runs `body(seat, *args)`. It sends values to the test with `seat.say` and receives orders with `seat.hear`. An
order ("abort", reason) sets the current abort signal from a thread, as the connection to the coordinator does.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from tests.processes import CONTEXT, start

PATIENCE_S = 60.0


@dataclass
class Seat:
    """A rank's process: its rank, the store's port, its connection to the test."""

    rank: int
    world: int
    port: int
    line: Connection
    abort: AbortSignal = field(default_factory=AbortSignal)
    aborted_at_s: float = 0.0
    orders: queue.Queue[Any] = field(default_factory=queue.Queue)

    def form(self, generation: int, rank: int, world: int, abort: AbortSignal | None = None) -> Group:
        """Begin a generation with an abort signal of its own."""
        self.abort = abort or AbortSignal()
        return Group(
            GroupMember(generation, rank, world), Rendezvous("127.0.0.1", self.port, "secret", 20.0), self.abort
        )

    def say(self, value: Any) -> None:
        self.line.send(value)

    def hear(self) -> Any:
        return self.orders.get(timeout=PATIENCE_S)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def listen(self) -> None:
        """The control thread."""
        try:
            while True:
                order = self.line.recv()
                if order[0] == "abort":
                    self.aborted_at_s = time.monotonic()
                    self.abort.set(order[1])
                else:
                    self.orders.put(order)
        except (EOFError, OSError):
            return


def alone(generation: int = 1, abort: AbortSignal | None = None, activity: list[int] | None = None) -> Group:
    """A group of one, which needs no store."""
    return Group(GroupMember(generation, 0, 1), Rendezvous("nowhere", 0, "", 1.0), abort or AbortSignal(), activity)


def _main(body: Callable[..., Any], seat: Seat, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=seat.listen, daemon=True).start()
    try:
        seat.say(("result", body(seat, *args)))
    except BaseException:
        seat.say(("error", traceback.format_exc()))
        raise


def _start(body: Callable[..., Any], rank: int, world: int, port: int, line: Connection, args: tuple[Any, ...]) -> None:
    _main(body, Seat(rank, world, port, line), args)


class Ranks:
    """A world of ranks, as a context manager that kills the remaining processes at its end."""

    def __init__(self, world: int, body: Callable[..., Any], *args: Any) -> None:
        self.rendezvous = RendezvousServer("127.0.0.1", "secret")
        self.rendezvous.start()
        self.lines: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            here, there = CONTEXT.Pipe()
            self.processes.append(start(_start, body, rank, world, self.rendezvous.port, there, args))
            there.close()
            self.lines.append(here)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for line in self.lines:
            line.close()
        self.rendezvous.close()

    def hear(self, rank: int) -> Any:
        """The next value that a rank says. Fails the test with the rank's traceback if the rank failed."""
        assert self.lines[rank].poll(PATIENCE_S), f"rank {rank} is silent"
        kind, value = self.lines[rank].recv()
        assert kind != "error", f"rank {rank}:\n{value}"
        return value

    def tell(self, rank: int, *order: Any) -> None:
        self.lines[rank].send(order)

    def await_death(self, rank: int) -> None:
        process = self.processes[rank]
        assert wait([process.sentinel], PATIENCE_S), f"rank {rank} lives"
        process.join()
        assert process.exitcode == -signal.SIGKILL

    def ended_well(self, ranks: list[int]) -> None:
        """These processes end by themselves with exit code 0."""
        for rank in ranks:
            self.processes[rank].join(PATIENCE_S)
            assert self.processes[rank].exitcode == 0, f"rank {rank}"


def results(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `body` on all ranks. Returns the results in the order of the ranks."""
    with Ranks(world, body, *args) as ranks:
        found = [ranks.hear(rank) for rank in range(world)]
        ranks.ended_well(list(range(world)))
    return found
