"""Groups of one generation: collectives, a death in the middle, an abort without a death, re-forming, ending."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.errors import GroupAborted
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember, Reduction
from elastic_moe.parallel.collectives.gloo import free_abandoned
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from tests.dist.ranks import Ranks, Seat, alone, results

FAST_S = 60.0  # far below the operation's own timeout of an hour: an abort ends a wait, a timeout does not


class Watched(AbortSignal):
    """Says "waiting" at the second read of `is_set`: `Group` reads it once before the start, then between slices.

    Attributes:
        armed: whether reads of `is_set` are counted.
    """

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat, self._looks, self.armed = seat, 0, False

    @property
    def is_set(self) -> bool:
        self._looks += self.armed
        if self._looks == 2:
            self._seat.say(("waiting", None))
        return self._event.is_set()


class SlowEnd:
    """Makes the interpreter linger in its end, where a thread that wants to run Python kills the process."""

    def __del__(self, sleep: Any = time.sleep) -> None:
        sleep(1.0)


def _collectives(seat: Seat) -> dict[str, Any]:
    rank, world = seat.rank, seat.world
    group = seat.form(1, rank, world)
    total = torch.full((3,), float(rank + 1))
    group.all_reduce(total)
    top = torch.tensor([rank, -rank])
    group.all_reduce(top, Reduction.MAX)
    strided = torch.zeros(4, 2)
    strided[:, 0] = rank
    group.all_reduce(strided[:, 0])
    gathered = group.all_gather(torch.tensor([[rank, rank * 10]]))
    in_splits = [(rank + dst) % 3 for dst in range(world)]  # some are zero
    out_splits = [(src + rank) % 3 for src in range(world)]
    inp = torch.cat([torch.full((n, 2), rank * 10.0 + dst) for dst, n in enumerate(in_splits)]).bfloat16()
    out = torch.empty(sum(out_splits), 2, dtype=torch.bfloat16)
    group.all_to_all(out, inp, out_splits, in_splits)
    sent = torch.tensor([float(rank)])
    group.broadcast(sent, world - 1)
    group.barrier()
    completed = group.completed
    group.close()
    return {
        "total": total.tolist(),
        "top": top.tolist(),
        "strided": strided.tolist(),
        "gathered": gathered.tolist(),
        "out": out.float().tolist(),
        "expected": [[src * 10.0 + rank] * 2 for src, n in enumerate(out_splits) for _ in range(n)],
        "sent": sent.item(),
        "completed": completed,
    }


@pytest.mark.parametrize("world", [1, 3])
def test_collectives(world: int) -> None:
    for found in results(world, _collectives):
        assert found["total"] == [world * (world + 1) / 2] * 3
        assert found["top"] == [world - 1, 0]
        assert found["strided"] == [[world * (world - 1) / 2, 0.0]] * 4
        assert found["gathered"] == [[[r, r * 10]] for r in range(world)]
        assert found["out"] == found["expected"]
        assert found["sent"] == world - 1
        assert found["completed"] == 7


def _lose_a_peer(seat: Seat, victim: int, operation: str) -> dict[str, Any]:
    """Generation 1 loses `victim` in the middle; the others form generation 2 and go on."""
    group = seat.form(1, seat.rank, seat.world)
    tensor, out = torch.ones(seat.world * 5000), torch.empty(seat.world * 5000)
    splits = [5000] * seat.world
    for count in range(1000):
        if seat.rank == victim and count == 5:
            seat.die()
        try:
            if operation == "all_reduce":
                group.all_reduce(tensor)
            else:
                group.all_to_all(out, tensor, splits, splits)
        except GroupAborted as error:
            raised_s, reason = time.monotonic(), str(error)
            seat.say(("raised", reason))
            break
    group.close()
    _, rank, world = seat.hear()
    began_s = time.monotonic()
    group = seat.form(2, rank, world)
    group.barrier()
    formed_s = time.monotonic() - began_s
    check = torch.ones(1)
    group.all_reduce(check)
    group.close()
    late_s = raised_s - seat.aborted_at_s if seat.aborted_at_s else 0.0
    return {"count": count, "late_s": late_s, "formed_s": formed_s, "check": check.item()}


@pytest.mark.parametrize(("victim", "operation"), [(0, "all_reduce"), (2, "all_to_all"), (1, "all_reduce")])
def test_survivors_of_a_death_go_on_in_the_next_generation(victim: int, operation: str) -> None:
    world = 4
    survivors = [r for r in range(world) if r != victim]
    with Ranks(world, _lose_a_peer, victim, operation) as ranks:
        ranks.await_death(victim)
        for rank in survivors:
            ranks.tell(rank, "abort", f"rank {victim} died")
        for rank in survivors:
            ranks.hear(rank)
        for new_rank, rank in enumerate(survivors):
            ranks.tell(rank, "view", new_rank, len(survivors))
        found = [ranks.hear(rank) for rank in survivors]
        ranks.ended_well(survivors)
    for result in found:
        assert result["count"] == 5
        assert result["late_s"] < FAST_S
        assert result["formed_s"] < FAST_S
        assert result["check"] == len(survivors)


def _peer_stands_still(seat: Seat) -> dict[str, Any] | None:
    """Rank 1 lives but never joins the second collective. No socket breaks; only the abort ends the others' wait."""
    watched = Watched(seat)
    group = seat.form(1, seat.rank, seat.world, watched)
    group.barrier()
    if seat.rank == 1:
        seat.hear()
        return None
    watched.armed = True
    with pytest.raises(GroupAborted, match="evicted") as caught:
        group.all_reduce(torch.ones(100_000))
    raised_s = time.monotonic()
    group.close()
    closed_s = time.monotonic()
    del caught  # the traceback must not hold the group, whose end would block here
    freed_s = time.monotonic()
    with pytest.raises(GroupAborted):
        group.barrier()
    left = free_abandoned()
    _, rank, world = seat.hear()
    group = seat.form(2, rank, world)
    check = torch.ones(1)
    group.all_reduce(check)
    group.close()
    module: Any = sys.modules[__name__]
    module.slow_end = SlowEnd()  # rank 1 is killed while this process ends, which completes the abandoned operation
    return {
        "late_s": raised_s - seat.aborted_at_s,
        "close_s": closed_s - raised_s,
        "free_s": freed_s - closed_s,
        "left": left,
        "check": check.item(),
    }


def test_abort_ends_a_wait_that_no_broken_socket_ends() -> None:
    with Ranks(3, _peer_stands_still) as ranks:
        for rank in (0, 2):
            ranks.hear(rank)
        for rank in (0, 2):
            ranks.tell(rank, "abort", "rank 1 was evicted")
        for new_rank, rank in enumerate((0, 2)):
            ranks.tell(rank, "view", new_rank, 2)
        found = [ranks.hear(rank) for rank in (0, 2)]
        ranks.processes[1].kill()
        ranks.ended_well([0, 2])  # and not with SIGSEGV or SIGABRT
    for result in found:
        assert 0 <= result["late_s"] < FAST_S
        assert result["close_s"] < FAST_S
        assert result["free_s"] < FAST_S
        assert result["left"] == 1
        assert result["check"] == 2


def _abandoned_is_freed(seat: Seat) -> list[int] | None:
    watched = Watched(seat)
    group = seat.form(1, seat.rank, seat.world, watched)
    group.barrier()
    if seat.rank == 1:
        seat.hear()
        return None
    watched.armed = True
    with pytest.raises(GroupAborted):
        group.all_reduce(torch.ones(10))
    group.close()
    counts = [free_abandoned()]
    seat.say(("abandoned", None))
    deadline_s = time.monotonic() + 20
    while free_abandoned() and time.monotonic() < deadline_s:
        seat.abort.wait(0)  # the condition is the operation's end
    return [*counts, free_abandoned()]


def test_an_abandoned_group_is_destroyed_once_its_operation_has_ended() -> None:
    with Ranks(2, _abandoned_is_freed) as ranks:
        ranks.hear(0)
        ranks.tell(0, "abort", "over")
        ranks.hear(0)
        ranks.processes[1].kill()
        assert ranks.hear(0) == [1, 0]


def _form_with_an_absent_peer(seat: Seat) -> float | None:
    if seat.rank == 1:
        return None
    seat.abort = AbortSignal()
    seat.say(("forming", None))  # only now: the order that answers it sets this signal
    with pytest.raises(GroupAborted, match="absent"):
        Group(GroupMember(1, 0, 2), Rendezvous("127.0.0.1", seat.port, "secret", 20.0), seat.abort)
    return time.monotonic() - seat.aborted_at_s


def test_abort_ends_forming() -> None:
    with Ranks(2, _form_with_an_absent_peer) as ranks:
        ranks.hear(0)
        ranks.tell(0, "abort", "rank 1 is absent")
        assert ranks.hear(0) < FAST_S


def test_store_that_is_gone_aborts_the_forming() -> None:
    with pytest.raises(GroupAborted, match="forming generation 3"):
        Group(GroupMember(3, 0, 2), Rendezvous("127.0.0.1", 1, "secret", 0.5), AbortSignal())


def test_group_of_one_and_abort_signal() -> None:
    abort, counter = AbortSignal(), [0]
    group = alone(1, abort, counter)
    tensor = torch.tensor([1.0])
    group.all_reduce(tensor)
    assert tensor.item() == 1
    assert not abort.is_set
    assert group.completed == 1
    assert counter == [2]
    abort.set("first")
    abort.set("second")
    assert abort.is_set
    assert abort.reason == "first"
    assert abort.wait(0)
    with pytest.raises(GroupAborted, match="first"):
        group.barrier()
    with pytest.raises(GroupAborted, match="first"):
        alone(2, abort)


def _listening(seat: Seat) -> list[str]:
    """Addresses on which this process listens while its group lives."""
    group = seat.form(1, seat.rank, seat.world)
    inodes: set[str] = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the directory itself
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
    found: list[str] = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].split(":")[0])
    group.barrier()
    group.close()
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux tells a process's listening sockets")
def test_groups_listen_only_where_the_coordinator_was_reached() -> None:
    for addresses in results(2, _listening):
        assert addresses
        assert set(addresses) == {"0100007F"}
