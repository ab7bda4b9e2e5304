"""Claims on an object store: under every order of puts and listings that is tried, one of several processes owns."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from elastic_moe.coordination import claims as claims_module
from elastic_moe.coordination.claims import Claims
from elastic_moe.coordination.owner import Owner, Taken

NEVER_S = 1e9
SCHEDULES = 150


class Turns:
    """Lets one of several threads at a time make its next call, chosen at random."""

    def __init__(self, seed: int, threads: int) -> None:
        self._draw, self._changed = random.Random(seed), threading.Condition()
        self._ready: set[int] = set()
        self._running = threads
        self._chosen: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One call of the thread."""
        me = threading.get_ident()
        with self._changed:
            self._ready.add(me)
            self._running -= 1
            self._choose()
            assert self._changed.wait_for(lambda: self._chosen == me, 60)
            self._chosen = None
            self._ready.discard(me)
            self._running += 1
        yield

    def end(self) -> None:
        """The thread makes no further call."""
        with self._changed:
            self._running -= 1
            self._choose()

    def _choose(self) -> None:
        if not self._running and self._ready and self._chosen is None:
            self._chosen = self._draw.choice(sorted(self._ready))
            self._changed.notify_all()


class Objects:
    """An object store in memory; each call is one turn."""

    def __init__(self) -> None:
        self.turns: Turns | None = None
        self.content: dict[str, bytes] = {}

    def __call__(self, place: str) -> Objects:
        return self

    def _next(self) -> None:
        if self.turns is not None:
            with self.turns.turn():
                pass

    def write(self, name: str, data: bytes) -> None:
        self._next()
        self.content[name] = data

    def read(self, name: str) -> bytes:
        self._next()
        if name not in self.content:
            raise FileNotFoundError(name)
        return self.content[name]

    def sizes(self, name: str) -> dict[str, int]:
        self._next()
        return {key.removeprefix(f"{name}/"): len(value) for key, value in list(self.content.items())}

    def size(self, name: str) -> int:
        return len(self.content.get(name, b"")) if name in self.content else -1

    def remove(self, name: str) -> None:
        self._next()
        self.content.pop(name, None)


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Objects:
    objects = Objects()
    monkeypatch.setattr(claims_module, "Storage", objects)
    return objects


def contend(objects: Objects, seed: int, count: int) -> list[str]:
    """What becomes of so many processes that take the directory together."""
    objects.content.clear()
    objects.turns = turns = Turns(seed, count)
    outcomes: list[str] = [""] * count

    def take(number: int) -> None:
        try:
            Claims("s3://b/r", Owner.here(), NEVER_S, NEVER_S, sleep=lambda _: objects._next()).take()
            outcomes[number] = "owns"
        except Taken:
            outcomes[number] = "refused"
        except (OSError, AssertionError, ValueError, TypeError) as error:
            outcomes[number] = repr(error)
        finally:
            turns.end()

    threads = [threading.Thread(target=take, args=(number,), name="claim") for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    objects.turns = None
    return outcomes


@pytest.mark.parametrize("count", [2, 3])
def test_one_of_several_owns_in_every_order(objects: Objects, count: int) -> None:
    for seed in range(SCHEDULES):
        assert sorted(contend(objects, seed, count)) == ["owns"] + ["refused"] * (count - 1), seed


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(claims_module, "awake_s", lambda: self.now_s)
        monkeypatch.setattr("elastic_moe.coordination.owner.time.monotonic", lambda: self.now_s)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def claims(clock: Clock, **owner: Any) -> Claims:
    return Claims("s3://b/r", replace(Owner.here(), **owner), 5.0, 30.0, sleep=clock.sleep)


def test_a_silent_owner_is_replaced_and_finds_out(objects: Objects, clock: Clock) -> None:
    silent = claims(clock, machine="elsewhere")
    silent.take()
    heir = claims(clock)
    heir.take()
    assert heir.confirm()
    assert 30 < clock.now_s < 60
    assert heir.beat()
    assert not silent.beat()
    silent.release()
    assert heir.beat()


def test_an_owner_whose_heir_has_ended_finds_out_too(objects: Objects, clock: Clock) -> None:
    silent = claims(clock, machine="elsewhere")
    silent.take()
    heir = claims(clock)
    heir.take()
    assert heir.confirm()
    heir.release()
    assert not silent.beat()


def test_a_put_that_comes_after_the_owner_was_replaced_changes_nothing(objects: Objects, clock: Clock) -> None:
    silent = claims(clock, machine="elsewhere")
    silent.take()
    heir = claims(clock)
    heir.take()
    assert heir.confirm()
    silent._put()
    assert not silent.beat()
    assert heir.beat()
    last = claims(clock, pid=1)
    with pytest.raises(Taken):
        last.take()


def test_an_owner_that_waits_for_its_storage_goes_on(objects: Objects, clock: Clock) -> None:
    owner = claims(clock)
    owner.take()
    clock.now_s += 1000.0
    assert owner.beat()
    objects.content.clear()  # somebody deleted it
    assert owner.beat()
    assert len(objects.content) == 1


def test_a_dead_process_of_this_machine_is_replaced_at_once(objects: Objects, clock: Clock) -> None:
    claims(clock, started_s=1.0).take()
    claims(clock).take()
    assert clock.now_s == 0
    assert len(objects.content) == 1


def test_a_silent_owner_that_wakes_before_its_successor_is_ready_goes_on(objects: Objects, clock: Clock) -> None:
    silent, heir = claims(clock, machine="elsewhere"), claims(clock)
    silent.take()
    heir.take()
    assert silent.beat()
    with pytest.raises(Taken):
        heir.confirm()
    heir.release()
    assert silent.beat()
    assert len(objects.content) == 1


def test_a_successor_that_fails_leaves_the_directory_to_the_silent_owner(objects: Objects, clock: Clock) -> None:
    silent, heir = claims(clock, machine="elsewhere"), claims(clock)
    silent.take()
    heir.take()
    heir.release()
    clock.now_s += 1000.0
    assert silent.beat()


def test_of_two_successors_one_replaces_the_silent_owner(objects: Objects, clock: Clock) -> None:
    silent, first, second = claims(clock, machine="elsewhere"), claims(clock), claims(clock)
    silent.take()
    first.take()
    with pytest.raises(Taken):
        second.take()
    assert first.confirm()
    assert not silent.beat()


def test_who_comes_while_an_owner_confirms_is_no_reason_to_refuse_it(objects: Objects, clock: Clock) -> None:
    silent, heir, newcomer = claims(clock, machine="elsewhere"), claims(clock), claims(clock)
    silent.take()
    heir.take()
    newcomer._put()  # it has no ticket yet
    assert heir.confirm()
    assert heir.beat()


def test_foreign_objects_are_nobodys_claims(objects: Objects, clock: Clock) -> None:
    objects.content |= {"lease/x.json": b"\0", "lease/y.json": b'{"owner": 3}', "lease/z.json": b"[]"}
    claims(clock).take()
