"""The seam between `Group` and the library that moves the bytes: operations as values, and the Protocol of a backend.

A backend serves one group of one generation and is thrown away with it. `Group` owns the order of calls: `form` once,
then `begin` and `poll`, then `release`. `Group` also turns failures into `GroupAborted`. A backend raises
`BackendError` alone.

Duties of every backend:
- *Abort from another thread.* The control connection's thread calls `abort` while the main thread may stand inside
  `form`, `begin`, `poll`, or a wait for the device. `abort` sets flags and wakes the others. It frees nothing, for the
  main thread may still use what it would free. `release` frees, in the main thread.
- *No watchdog.* A library's own timeout thread ends the process or its communicators. Hangs are the coordinator's
  business: it evicts the rank that does not move. So the library's timeouts and watchdogs are off, or longer than any
  run's patience.
- *Garbage after an abort.* After an abort the outputs of unfinished operations hold arbitrary bytes. With a library
  whose aborted ranks let their peers go on (NCCL), even a completed operation proves nothing about its bytes. There,
  data may enter the training state only after every member has said over a host backend that its own part ended without
  an abort.
- *Streams.* Callers issue operations and kernels on their current stream. A backend with streams of its own orders an
  operation behind the work that the current stream holds at `begin`. When `poll` has returned True, work that the
  caller enqueues afterwards sees the results. The backend keeps all tensors of an operation alive until the device is
  done with them.
- *Devices.* A backend takes tensors on any device that it is registered for. Copies to host memory are the backend's
  own.

Source for NCCL's behaviour: its source at tag v2.29.7-1 (`init.cc`, `device/prims_simple.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

import torch

from elastic_moe.parallel.collectives.store import Rendezvous

SLICE_S = 0.02  # the longest native wait between two looks at the abort signal, in seconds
Work = TypeVar("Work")


class BackendError(RuntimeError):
    """Forming or an operation failed, or the backend was aborted. The group cannot be used any more."""


class Reduction(Enum):
    """How `AllReduce` joins the ranks' elements."""

    SUM = "sum"
    MAX = "max"


@dataclass(frozen=True)
class GroupMember:
    """This process's place in a group.

    Attributes:
        generation: of the view; a store's keys of two generations never meet.
        rank, world_size: of this process in the group.
        subgroup: name of a part of the generation's members, unique in the generation; "" for all members.
    """

    generation: int
    rank: int
    world_size: int
    subgroup: str = ""

    @property
    def key_prefix(self) -> str:
        """Prefix of all keys that the group writes to the store."""
        return f"g{self.generation}/{self.subgroup}"


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Reduce `tensor` in place over all ranks; same shape and dtype everywhere."""

    tensor: torch.Tensor
    reduction: Reduction

    @property
    def device(self) -> torch.device:
        return self.tensor.device


@dataclass(frozen=True, eq=False)
class AllGather:
    """Stack every rank's `inp` [*shape] into `out` [R, *shape]. `out` may be on another device than `inp`."""

    out: torch.Tensor
    inp: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.out.device


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Uneven all-to-all along dim 0: `in_splits[d]` rows of `inp` go to rank d, `out_splits[s]` rows of `out` come from
    s.
    """

    out: torch.Tensor
    inp: torch.Tensor
    out_splits: Sequence[int]
    in_splits: Sequence[int]

    @property
    def device(self) -> torch.device:
        return self.out.device


@dataclass(frozen=True, eq=False)
class Broadcast:
    """Copy rank `src`'s `tensor` to all ranks, in place."""

    tensor: torch.Tensor
    src: int

    @property
    def device(self) -> torch.device:
        return self.tensor.device


Operation = AllReduce | AllGather | AllToAll | Broadcast


class CollectiveBackend(Protocol[Work]):
    """The collectives of one group of one generation. `Work` is the backend's own handle of an operation under way."""

    def form(self, member: GroupMember, rendezvous: Rendezvous) -> None:
        """Connect all members. Blocks; a call of `abort` from another thread must end it within `SLICE_S` or so.

        The slowest member may take its time to arrive. `rendezvous.timeout_s` counts from the arrival of the last one.
        A backend for devices may count on a formed host backend of the same members: all members have arrived by then.

        Raises:
            BackendError: the store or a member cannot be reached, or the backend was aborted.
        """
        ...

    def begin(self, operation: Operation) -> Work:
        """Start an operation, and return before it ends. All ranks begin the same operations in the same order.

        Raises:
            BackendError: the operation cannot start, because of a dead peer or an abort.
        """
        ...

    def poll(self, work: Work, timeout_s: float) -> bool:
        """Wait for an operation for at most `timeout_s`. Returns whether it has completed and its outputs may be used.

        A timeout leaves the operation under way and harms nothing. A backend without a timed wait looks, sleeps and
        looks again. In particular torch's `ProcessGroupNCCL` must not be waited for with a timeout: on expiry it
        aborts.

        Raises:
            BackendError: the operation failed, or the backend was aborted.
        """
        ...

    def abort(self) -> None:
        """End the group. Called from any thread, at any time, more than once, also before `form` and after `release`.

        Returns at once, raises nothing and frees nothing. A call of `form` that is under way raises BackendError soon
        after. The backend wakes a main thread that waits for the device behind one of its operations, if it can be
        stuck there. A `poll` that is under way raises, or returns False when its timeout is over.
        """
        ...

    def release(self) -> None:
        """Let go of the group's resources. Called by the thread that uses the group; may be called more than once.

        Never blocks, whatever is under way: resources that an operation may still touch are kept until it has ended.
        """
        ...
