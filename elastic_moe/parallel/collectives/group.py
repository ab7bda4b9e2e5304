"""Process groups that can be thrown away: one per generation, outside torch's global registry.

gloo's own `abort` wakes nobody, and ranks that do not exchange with a dead one hang until the operation's timeout. So every
collective is started asynchronously and waited for in slices of `SLICE_S` inside the native wait: completion wakes it at once,
and the generation's abort signal is looked at between slices. Measured with gloo (torch 2.13, Python 3.11):
- no Python may run on behalf of an abandoned operation: when the process ends while a peer's death completes it, a future's
  callback dies of SIGSEGV and a thread in `wait` or in the group's destructor of SIGABRT. Slices leave nothing behind, and cost
  less than callbacks (0.6 against 0.9 ms for a small all-reduce of two ranks on two cores);
- destroying a group blocks until its operations end. So a group with one under way is kept, with the tensors that it may still
  write to, and destroyed when a later group is formed or closed and the operation has ended; at process exit never.

The store lives with the coordinator: rank 0's death must not take it along. The only file that constructs torch.distributed objects.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from elastic_moe.errors import GroupAborted

SLICE_S = 0.02  # an abort ends every wait within this time
ARRIVAL_POLL_S = 0.005
OPERATION_TIMEOUT_S = 3600.0  # peers may be slow for good reasons; hangs are the coordinator's business
SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX

_SLICE = timedelta(seconds=SLICE_S)


class AbortSignal:
    """Tells every waiter of one generation that it is over. `set` may be called from any thread, any number of times."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.reason: str | None = None

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        """End the generation; the first reason stays."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
            self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the abort, at most this long. Returns whether it is set."""
        return self._event.wait(timeout_s)

    def check(self) -> None:
        """Raise GroupAborted if the generation is over."""
        if self.is_set:
            raise GroupAborted(self.reason)


class _Abandoned:
    """A group with an operation under way, and the tensors of that operation. Immortal until the operation has ended."""

    def __init__(self, group: dist.ProcessGroupGloo, work: dist.Work, tensors: tuple[torch.Tensor, ...]) -> None:
        self.work, self._kept = work, (group, work, tensors)
        # So that the end of the interpreter does not destroy it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._kept))

    def release(self) -> None:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._kept))


_abandoned: list[_Abandoned] = []
_abandoned_lock = threading.Lock()


def sweep() -> int:
    """Destroy abandoned groups whose operation has ended meanwhile. Returns how many are left."""
    with _abandoned_lock:
        ended = [item for item in _abandoned if item.work.is_completed()]
        _abandoned[:] = [item for item in _abandoned if item not in ended]
        left = len(_abandoned)
    for item in ended:
        item.release()
    return left


class Pending:
    """A collective under way. `wait` must be called before the tensors are used, and may be called again."""

    def __init__(self, group: Group, tensors: tuple[torch.Tensor, ...], then: Callable[[], None]) -> None:
        self.work: dist.Work | None = None
        self.tensors = tensors
        self._group: Group | None = group
        self._then = then

    def wait(self) -> None:
        """Return once it has completed. Raises GroupAborted if the generation is over."""
        group, self._group = self._group, None
        if group is not None:
            group.finish(self)
            self._then()


class Group:
    """The collectives of one generation over gloo.

    Tensors on another device travel through host memory.

    Args:
        host, port: the coordinator's store.
        generation: of the view; keys in the store are prefixed with it.
        rank, world_size: of this process in the view.
        abort: ends every wait.
        timeout_s: for connecting to the members, once all of them have arrived, in seconds.
        completed: one-element counter, raised when a collective begins and when it completes (so that a rank that hangs between two
            is told from those that wait for it); read by the heartbeats.
        name: of a part of the generation's members; see `part`.

    Attributes:
        completed: collectives of this generation that have completed.

    Raises:
        GroupAborted: the generation ended, or a member could not be reached, while the group was formed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        generation: int,
        rank: int,
        world_size: int,
        abort: AbortSignal,
        timeout_s: float,
        completed: list[int] | None = None,
        name: str = "",
    ) -> None:
        self._where, self._name, self._parts = (host, port, timeout_s), name, list[Group]()
        self.generation, self.rank, self.world_size = generation, rank, world_size
        self.completed = 0
        self._counter = completed if completed is not None else [0]
        self._abort, self._group = abort, None
        self._failed: str | None = None
        self._pending: set[Pending] = set()
        sweep()
        abort.check()
        if world_size > 1:
            self._group = self._form(host, port, timeout_s)

    def _form(self, host: str, port: int, timeout_s: float) -> dist.ProcessGroupGloo:
        """Connect to all members in a thread, so that an abort need not wait for a connection's timeout.

        The thread is no daemon: the interpreter must not end while native code is going to return into it.
        """
        done = threading.Event()
        result: list[dist.ProcessGroupGloo | RuntimeError] = []

        def connect() -> None:
            limit = timedelta(seconds=timeout_s)
            try:
                store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
                keys = dist.PrefixStore(f"g{self.generation}/{self._name}", store)
                if keys.add("arrived", 1) == self.world_size:
                    keys.set("go", "1")
                while not keys.check(["go"]):  # the slowest member may take its time; an abort ends it
                    if self._abort.wait(ARRIVAL_POLL_S):
                        return
                result.append(dist.ProcessGroupGloo(keys, self.rank, self.world_size, limit))
            except RuntimeError as error:
                result.append(error)
            finally:
                done.set()

        threading.Thread(target=connect, name="group-form", daemon=False).start()
        while not done.wait(SLICE_S):
            self._abort.check()
        self._abort.check()
        formed = result.pop()
        if isinstance(formed, RuntimeError):
            raise GroupAborted(f"forming generation {self.generation}: {formed}") from formed
        formed.set_timeout(timedelta(seconds=OPERATION_TIMEOUT_S))
        return formed

    def part(self, name: str, ranks: Sequence[int]) -> Group:
        """A group of some of the members, among them this one; closed with this group. All of them must form their parts in the same order."""
        host, port, timeout_s = self._where
        rank, size = list(ranks).index(self.rank), len(ranks)
        name = f"{name}:{'-'.join(map(str, ranks))}"
        name = f"{name}.{sum(part.is_named(name) for part in self._parts)}"  # its keys in the store are used once
        part = Group(host, port, self.generation, rank, size, self._abort, timeout_s, self._counter, f"{name}/")
        self._parts.append(part)
        return part

    def is_named(self, name: str) -> bool:
        """Whether this is a part that was formed under that name."""
        return self._name.rpartition(".")[0] == name

    def _begin(
        self,
        start: Callable[[dist.ProcessGroupGloo], dist.Work],
        *tensors: torch.Tensor,
        then: Callable[[], None] = lambda: None,
    ) -> Pending:
        """Start an operation on these tensors; `then` is called once it has been waited for."""
        self._abort.check()
        if self._failed is not None:
            raise GroupAborted(self._failed)
        self._counter[0] += 1
        pending = Pending(self, tensors, then)
        if self.world_size > 1:
            assert self._group is not None, "the group is closed"
            try:
                pending.work = start(self._group)
            except RuntimeError as error:
                self._fail(error)
            self._pending.add(pending)
        return pending

    def finish(self, pending: Pending) -> None:
        """Wait until an operation has completed or the generation is over; `Pending.wait` calls it."""
        if pending.work is not None:
            try:
                while not _ended(pending.work):
                    if self._abort.is_set:
                        self.close()
                        self._abort.check()
            except GroupAborted:
                raise
            except RuntimeError as error:
                self._fail(error)
            self._pending.discard(pending)
        self._counter[0] += 1
        self.completed += 1

    def _fail(self, error: RuntimeError) -> NoReturn:
        self._failed = f"collective failed: {error}"
        raise GroupAborted(self._failed) from error

    def _run(self, start: Callable[[dist.ProcessGroupGloo], dist.Work], *tensors: torch.Tensor) -> None:
        """Start an operation and wait for it."""
        self._begin(start, *tensors).wait()

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = SUM) -> None:
        """Reduce in place over all ranks."""
        options = dist.AllreduceOptions()
        options.reduceOp = op
        host = _host(tensor)
        self._run(lambda g: g.allreduce([host], options), host)
        _copy_back(tensor, host)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack every rank's tensor of equal shape: [R, *shape], on the tensor's device."""
        host = _host(tensor)
        out = torch.empty((self.world_size, *host.shape), dtype=host.dtype)
        if self.world_size == 1:
            out[0] = host
        self._run(lambda g: g.allgather([list(out.unbind(0))], [host]), out, host)
        return out.to(tensor.device)

    def all_to_all(self, out: torch.Tensor, inp: torch.Tensor, out_splits: list[int], in_splits: list[int]) -> None:
        """Uneven all-to-all along dim 0: `in_splits[d]` rows go to rank d, `out_splits[s]` rows come from rank s."""
        self.begin_all_to_all(out, inp, out_splits, in_splits).wait()

    def begin_all_to_all(
        self, out: torch.Tensor, inp: torch.Tensor, out_splits: list[int], in_splits: list[int]
    ) -> Pending:
        """As `all_to_all`, but returns at once; other collectives may come before its end, on all ranks alike."""
        host_out, host_in = _host(out), _host(inp)
        if self.world_size == 1:
            host_out.copy_(host_in)
        return self._begin(
            lambda g: g.alltoall_base(host_out, host_in, out_splits, in_splits),
            host_out,
            host_in,
            then=lambda: _copy_back(out, host_out),
        )

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Copy rank src's tensor to all, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        host = _host(tensor)
        self._run(lambda g: g.broadcast([host], options), host)
        _copy_back(tensor, host)

    def barrier(self) -> None:
        """Return once every rank has entered."""
        self.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Drop the group; never blocks. What is still under way in it is handed to the abandoned."""
        if self._group is not None:
            with _abandoned_lock:
                for pending in self._pending:
                    if pending.work is not None and not pending.work.is_completed():
                        _abandoned.append(_Abandoned(self._group, pending.work, pending.tensors))
        self._pending.clear()
        self._group = None
        for part in self._parts:
            part.close()
        sweep()


def _ended(work: dist.Work) -> bool:
    """Wait for one slice. Raises RuntimeError if the operation has failed."""
    try:
        work.wait(_SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises if it was the operation that failed, and not the slice that ran out
    return True


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where gloo can use it, else a copy in host memory."""
    return tensor.detach().cpu().contiguous()


def _copy_back(tensor: torch.Tensor, host: torch.Tensor) -> None:
    if host.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(host)
