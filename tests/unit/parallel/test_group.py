"""`Group` over a backend that fails on command: what callers see at every stage, and what the backend is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from elastic_moe.errors import FormingFailed, GroupAborted
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import AllToAll, BackendError, GroupMember, Operation
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous

NOWHERE = Rendezvous("nowhere", 0, "", 1.0)
PATIENCE_S = 60.0


class FakeBackend:
    """Completes each operation at the n-th look, or fails at a chosen stage; records the calls."""

    def __init__(self, fail: str = "", looks: int = 1, on_poll: Callable[[], object] = lambda: None) -> None:
        self.calls: list[str] = []
        self.operations: list[Operation] = []
        self._fail, self._looks, self._on_poll = fail, looks, on_poll
        self._aborted = threading.Event()
        self.waiting = threading.Event()

    def form(self, member: GroupMember, rendezvous: Rendezvous) -> None:
        self.calls.append(f"form {member.key_prefix} {member.rank}/{member.world_size}")
        if self._fail == "hang":
            self.waiting.set()
            assert self._aborted.wait(PATIENCE_S)
            raise BackendError("woken")
        self._stage("form")

    def begin(self, operation: Operation) -> list[int]:
        self.calls.append("begin")
        self._stage("begin")
        self.operations.append(operation)
        return [self._looks]

    def poll(self, work: list[int], timeout_s: float) -> bool:
        assert 0 < timeout_s < 1
        self._on_poll()
        self._stage("poll")
        work[0] -= 1
        return work[0] <= 0

    def abort(self) -> None:
        self.calls.append("abort")
        self._aborted.set()

    def release(self) -> None:
        self.calls.append("release")

    def _stage(self, name: str) -> None:
        if self._fail == name:
            raise BackendError(f"{name} broke")


def _group(backend: FakeBackend, abort: AbortSignal, activity: list[int] | None = None, **more: Any) -> Group:
    backends = {"cpu": lambda: backend} | more.pop("backends", {})
    return Group(GroupMember(7, 1, 3), NOWHERE, abort, activity, backends=backends, **more)


def test_failure_at_forming_aborts_and_releases() -> None:
    backend, abort = FakeBackend("form"), AbortSignal()
    with pytest.raises(GroupAborted, match="forming generation 7: form broke"):
        _group(backend, abort)
    assert backend.calls == ["form g7/ 1/3", "release"]
    abort.set("later")
    assert "abort" not in backend.calls, "a released backend hears no more of the signal"


def test_abort_from_another_thread_ends_forming_with_its_reason() -> None:
    backend, abort = FakeBackend("hang"), AbortSignal()

    def end() -> None:
        assert backend.waiting.wait(PATIENCE_S)
        abort.set("rank 2 died")

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(GroupAborted, match="rank 2 died"):
        _group(backend, abort)
    thread.join()
    assert backend.calls == ["form g7/ 1/3", "abort", "release"]


@pytest.mark.parametrize(("stage", "counted"), [("begin", 1), ("poll", 1)])
def test_a_failed_operation_spoils_the_group(stage: str, counted: int) -> None:
    backend, activity = FakeBackend(stage), [0]
    group = _group(backend, AbortSignal(), activity)
    with pytest.raises(GroupAborted, match=f"collective failed: {stage} broke"):
        group.barrier()
    calls = list(backend.calls)
    with pytest.raises(GroupAborted, match=f"collective failed: {stage} broke"):
        group.barrier()
    assert backend.calls == calls, "nothing begins on a failed group"
    assert activity == [counted]
    assert group.completed == 0
    group.close()
    assert backend.calls[-1] == "release"


def test_a_failed_wait_fails_again() -> None:
    group = _group(FakeBackend("poll"), AbortSignal())
    pending = group.begin_all_to_all(torch.zeros(3), torch.zeros(3), [1, 1, 1], [1, 1, 1])
    for _ in range(2):
        with pytest.raises(GroupAborted, match="poll broke"):
            pending.wait()


def test_abort_while_waiting_releases_at_once() -> None:
    abort = AbortSignal()
    backend = FakeBackend(looks=1000, on_poll=lambda: abort.set("newer view"))
    group = _group(backend, abort)
    with pytest.raises(GroupAborted, match="newer view"):
        group.barrier()
    assert backend.calls == ["form g7/ 1/3", "begin", "abort", "release"]
    with pytest.raises(GroupAborted, match="newer view"):
        group.barrier()


def test_the_reason_of_the_abort_comes_before_the_failure_that_it_causes() -> None:
    abort = AbortSignal()
    group = _group(FakeBackend("poll", on_poll=lambda: abort.set("newer view")), abort)
    with pytest.raises(GroupAborted, match="newer view"):
        group.barrier()


def test_completion_counts_for_the_heartbeats() -> None:
    backend, activity = FakeBackend(looks=3), [0]
    group = _group(backend, AbortSignal(), activity)
    pending = group.begin_all_to_all(torch.zeros(3), torch.zeros(3), [1, 1, 1], [1, 1, 1])
    assert activity == [1]
    assert group.completed == 0
    pending.wait()
    pending.wait()
    assert activity == [2]
    assert group.completed == 1
    assert isinstance(backend.operations[0], AllToAll)


def test_subgroups_have_keys_of_their_own_and_end_with_the_group() -> None:
    made: list[FakeBackend] = []

    def make() -> FakeBackend:
        made.append(FakeBackend())
        return made[-1]

    group = Group(GroupMember(7, 1, 3), NOWHERE, AbortSignal(), backends={"cpu": make})
    first, second = (group.subgroup("pair", [2, 1]) for _ in range(2))
    assert (first.rank, first.world_size) == (1, 2)
    assert made[1].calls == ["form g7/pair:2-1.0/ 1/2"]
    assert made[2].calls == ["form g7/pair:2-1.1/ 1/2"]
    group.close()
    assert [backend.calls[-1] for backend in made] == ["release"] * 3
    assert second.generation == 7


def test_an_operation_goes_to_the_backend_of_its_device() -> None:
    host, device = FakeBackend(), FakeBackend()
    meta = torch.device("meta")
    group = _group(host, AbortSignal(), backends={"meta": lambda: device}, device=meta)
    assert host.calls == device.calls == ["form g7/ 1/3"]
    group.all_reduce(torch.zeros(2, device=meta))
    gathered = group.all_gather(torch.zeros(2, device=meta), torch.device("cpu"))
    group.barrier()
    assert gathered.shape == (3, 2)
    assert gathered.device.type == "cpu"
    assert (len(device.operations), len(host.operations)) == (1, 2), "results for the host come over the host's backend"


def test_a_device_without_a_backend_uses_the_host_backend() -> None:
    host = FakeBackend()
    group = _group(host, AbortSignal(), device=torch.device("meta"))
    group.all_reduce(torch.zeros(2, device="meta"))
    assert len(host.operations) == 1


def test_the_signal_runs_each_callback_once() -> None:
    abort, calls = AbortSignal(), list[str]()

    def early() -> None:
        calls.append("early")

    def removed() -> None:
        calls.append("removed")

    abort.add_callback(early)
    abort.add_callback(removed)
    abort.remove_callback(removed)
    abort.set("first")
    abort.set("second")
    abort.add_callback(lambda: calls.append("late"))
    assert calls == ["early", "late"]
    assert abort.reason == "first"


def test_a_backend_that_is_added_takes_its_devices_tensors_in_later_subgroups_too() -> None:
    host, abort, made = FakeBackend(), AbortSignal(), list[FakeBackend]()

    def make() -> FakeBackend:
        made.append(FakeBackend())
        return made[-1]

    group = _group(host, abort, device=torch.device("meta"))
    group.use("meta", make)
    assert made[0].calls == host.calls == ["form g7/ 1/3"], "the host's is formed once"
    on_device = torch.zeros(3, device="meta")
    group.all_reduce(on_device)
    group.barrier()
    group.subgroup("part", [1, 2]).all_reduce(on_device)
    assert [[operation.device.type for operation in backend.operations] for backend in made] == [["meta"], ["meta"]]
    assert [operation.device.type for operation in host.operations] == ["cpu"]
    assert made[1].calls[0].startswith("form g7/part:1-2")
    abort.set("over")
    assert [backend.calls[-1] for backend in made] == ["abort"] * 2
    group.close()
    assert [backend.calls[-1] for backend in made] == ["release"] * 2


@pytest.mark.parametrize("aborted", [False, True])
def test_a_backend_that_cannot_be_added_closes_the_group(aborted: bool) -> None:
    host, abort = FakeBackend(), AbortSignal()
    group = _group(host, abort)
    other = FakeBackend("form")
    if aborted:
        abort.set("a newer view")
    expected = (GroupAborted, "a newer view") if aborted else (FormingFailed, "forming generation 7: form broke")
    with pytest.raises(expected[0], match=expected[1]):
        group.use("meta", lambda: other)
    assert host.calls[-1] == other.calls[-1] == "release"
