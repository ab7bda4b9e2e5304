"""Collectives as the rest of the package sees them: `Group`, one per generation, and `Pending`, an operation under way.

`Group` gives every operation to the backend of its tensors' device, counts operations for the heartbeats, and raises
`GroupAborted` when the generation is over or a peer is lost. The bytes are the backends' business (`backend.py`). One
that only some members can use is added by `use`, once all have agreed on it (`choice.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from elastic_moe.errors import FormingFailed, GroupAborted
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import (
    SLICE_S,
    AllGather,
    AllReduce,
    AllToAll,
    BackendError,
    Broadcast,
    CollectiveBackend,
    GroupMember,
    Operation,
    Reduction,
)
from elastic_moe.parallel.collectives.gloo import GlooBackend
from elastic_moe.parallel.collectives.store import Rendezvous

HOST = torch.device("cpu")

# Device type -> backend. The host's is always formed, and takes the tensors of devices that have none of their own.
BACKENDS: dict[str, Callable[[], CollectiveBackend[Any]]] = {
    "cpu": GlooBackend,
}


class Pending:
    """A collective under way. Call `wait` before the tensors are used; a further call returns at once.

    Attributes:
        backend, work: the backend's handle; None in a group of one, where nothing is under way.
    """

    def __init__(self, group: Group, backend: CollectiveBackend[Any] | None = None, work: object = None) -> None:
        self.backend, self.work = backend, work
        self._group: Group | None = group

    def wait(self) -> None:
        """Return once it has completed.

        Raises:
            GroupAborted: the generation is over, or the operation failed.
        """
        if self._group is not None:
            self._group.finish(self)
            self._group = None


class Group:
    """The collectives of one generation.

    Not thread-safe: one thread calls the methods. The abort signal alone may come from other threads.

    Args:
        member: this process's place in the view.
        rendezvous: the coordinator's store.
        abort: ends every wait.
        activity: one-element counter, raised when an operation begins and when it completes. So a rank that hangs
            between two operations is told from those that wait for it. The heartbeats read it.
        device: of the tensors that travel; a backend of its type is formed too, where there is one.
        backends: device type -> maker of a backend.
        waited: of the group that this one is a part of.

    Attributes:
        generation, rank, world_size: of the member.
        device: of the tensors that travel.
        abort, activity: as they were given. Who computes for long without a collective checks the one and raises the
            other.
        completed: operations of this group that have completed.
        waited: one-element sum of the seconds that the thread has waited for operations, those of subgroups included.

    Raises:
        FormingFailed: a member could not be reached.
        GroupAborted: the generation ended while the group was formed.
    """

    def __init__(
        self,
        member: GroupMember,
        rendezvous: Rendezvous,
        abort: AbortSignal,
        activity: list[int] | None = None,
        *,
        device: torch.device = HOST,
        backends: Mapping[str, Callable[[], CollectiveBackend[Any]]] = BACKENDS,
        waited: list[float] | None = None,
    ) -> None:
        self._member, self._rendezvous, self.abort = member, rendezvous, abort
        self.device, self._make = device, backends
        self.generation, self.rank, self.world_size = member.generation, member.rank, member.world_size
        self.completed = 0
        self.activity = activity if activity is not None else [0]
        self.waited = waited if waited is not None else [0.0]
        self._subgroups: list[Group] = []
        self._subgroup_names: Counter[str] = Counter()
        self._failure: str | None = None
        self._backends = {kind: backends[kind]() for kind in dict.fromkeys(("cpu", device.type)) if kind in backends}
        abort.check()
        self._form()

    def use(self, kind: str, make: Callable[[], CollectiveBackend[Any]]) -> None:
        """Give tensors on devices of a type a backend of their own, in later subgroups too; collective.

        Args:
            kind: of device, such as "cuda".
            make: of the backend.

        Raises:
            FormingFailed: it could not be formed; the group is closed.
            GroupAborted: the generation ended meanwhile; the group is closed.
        """
        assert kind not in self._backends, "its tensors have a backend"
        self._make = {**self._make, kind: make}
        self._backends[kind] = make()
        self._form(kind)

    def _form(self, only: str = "") -> None:
        """Connect the backends, the host's first, or one of them. The group is closed where that fails."""
        if self.world_size == 1:
            return
        try:
            for kind, backend in self._backends.items():
                if only in ("", kind):
                    self.abort.add_callback(backend.abort)
                    backend.form(self._member, self._rendezvous)
        except BackendError as error:
            self.close()
            self.abort.check()
            raise FormingFailed(f"forming generation {self.generation}: {error}") from error

    def subgroup(self, name: str, ranks: Sequence[int]) -> Group:
        """A group of some of the members, among them this one; it is closed with this group.

        Args:
            name: a word for the store's keys.
            ranks: of the members, in the order of their ranks in the subgroup. All members form their subgroups in the
                same order.

        Raises:
            GroupAborted: see `Group`.
        """
        name = f"{name}:{'all' if len(ranks) == self.world_size else '-'.join(map(str, ranks))}"
        unique = f"{self._member.subgroup}{name}.{self._subgroup_names[name]}/"  # keys of the store are used once
        self._subgroup_names[name] += 1
        place = replace(self._member, rank=list(ranks).index(self.rank), world_size=len(ranks), subgroup=unique)
        group = Group(
            place,
            self._rendezvous,
            self.abort,
            self.activity,
            device=self.device,
            backends=self._make,
            waited=self.waited,
        )
        self._subgroups.append(group)
        return group

    def all_reduce(self, tensor: torch.Tensor, reduction: Reduction = Reduction.SUM) -> None:
        """Reduce in place over all ranks."""
        self._begin(AllReduce(tensor, reduction)).wait()

    def all_gather(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Stack every rank's tensor of equal shape: [R, *shape], on `device`, or on the tensor's own where that is
        None.
        """
        out = torch.empty((self.world_size, *tensor.shape), dtype=tensor.dtype, device=device or tensor.device)
        if self.world_size == 1:
            out[0] = tensor.detach()
        self._begin(AllGather(out, tensor)).wait()
        return out

    def all_to_all(
        self, out: torch.Tensor, inp: torch.Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> None:
        """Uneven all-to-all along dim 0: `in_splits[d]` rows go to rank d, `out_splits[s]` rows come from rank s."""
        self.begin_all_to_all(out, inp, out_splits, in_splits).wait()

    def begin_all_to_all(
        self, out: torch.Tensor, inp: torch.Tensor, out_splits: Sequence[int], in_splits: Sequence[int]
    ) -> Pending:
        """As `all_to_all`, but return at once. Other collectives may come before its end, on all ranks alike."""
        if self.world_size == 1:
            out.detach().copy_(inp.detach())
        return self._begin(AllToAll(out, inp, out_splits, in_splits))

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Copy rank src's tensor to all, in place."""
        self._begin(Broadcast(tensor, src)).wait()

    def barrier(self) -> None:
        """Return once every rank has entered."""
        self.all_reduce(torch.zeros(1, device=HOST))

    def attest(self) -> None:
        """Return once every rank has said that all operations it has waited for on this group ended without an abort.

        Only then do the bytes that the group's operations brought prove anything: see "Garbage after an abort" in
        `backend.py`. Whatever they brought may enter the training state only after it.

        Raises:
            GroupAborted: this rank, or another one, has been aborted: what arrived may be anything.
        """
        self.barrier()  # over the host's backend; a rank that was aborted, or whose operation failed, never enters it

    def close(self) -> None:
        """Release the group and its subgroups. Never blocks; the caller may use its tensors again."""
        for backend in self._backends.values():
            self.abort.remove_callback(backend.abort)
            backend.release()
        for subgroup in self._subgroups:
            subgroup.close()

    def _begin(self, operation: Operation) -> Pending:
        """Start an operation on the backend of its device."""
        self.abort.check()
        if self._failure is not None:
            raise GroupAborted(self._failure)
        self.activity[0] += 1
        if self.world_size == 1:
            return Pending(self)
        backend = self._backends.get(operation.device.type, self._backends["cpu"])
        try:
            return Pending(self, backend, backend.begin(operation))
        except BackendError as error:
            self._fail(error)

    def finish(self, pending: Pending) -> None:
        """Wait until an operation has completed or the generation is over; `Pending.wait` calls it."""
        if pending.backend is not None:
            if self._failure is not None:
                raise GroupAborted(self._failure)
            since_s = time.perf_counter()
            try:
                while not pending.backend.poll(pending.work, SLICE_S):
                    if self.abort.is_set:
                        self._fail(None)
            except BackendError as error:
                self._fail(error)
            self.waited[0] += time.perf_counter() - since_s
        self.activity[0] += 1
        self.completed += 1

    def _fail(self, error: BackendError | None) -> NoReturn:
        """Report a failed operation. If the generation is over, report that instead, and let go of everything."""
        if self.abort.is_set:
            self._failure = str(self.abort.reason)
            self.close()
            raise GroupAborted(self.abort.reason)
        self._failure = f"collective failed: {error}"
        raise GroupAborted(self._failure) from error
