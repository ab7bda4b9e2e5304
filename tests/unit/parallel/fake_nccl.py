"""A stand-in for NCCL and for a stream of the GPU: one process, tensors of the host, real calls of C functions.

The functions are C function pointers with the types of the real ones, so a call converts its arguments as it would for
NCCL. A rank's data go to itself only. Errors inside a callback would be lost, so the callbacks only note and copy.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch

from elastic_moe.parallel.collectives.nccl import NcclBackend
from elastic_moe.parallel.collectives.nccl_library import FUNCTIONS, IN_PROGRESS, SUCCESS, NcclLibrary

COMM = 0xC0FFEE
STREAM = 0x57EA
UNIQUE_ID = bytes(range(1, 128)) + b"\0"


class FakeNccl:
    """NCCL's functions.

    Attributes:
        calls: (name, arguments) of all calls but `ncclCommGetAsyncError`, in order.
        threads: name of a function -> name of the thread that called it last.
        looks: how often a call is in progress before it has settled.
        stuck: functions after whose call nothing settles before an abort.
        results: name of a function -> what it returns.
        error: what `ncclCommGetAsyncError` finds, if not SUCCESS.
        kernels_run: whether kernels wait for a peer; a revocation and an abort end them.
        in_abort: set when `ncclCommAbort` is called; it returns when `may_abort` is set.
        config: as `ncclCommInitRankConfig` has got it, by name of its fields.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.threads: dict[str, str] = {}
        self.looks, self.stuck, self.error = 0, set[str](), SUCCESS
        self.results: dict[str, int] = {}
        self.kernels_run = False
        self.in_abort, self.may_abort = threading.Event(), threading.Event()
        self.may_abort.set()
        self.config: dict[str, Any] = {}
        self._in_progress = 0
        self.ncclGetErrorString: Any = lambda result: f"error string {result}".encode()
        self.ncclGetLastError: Any = lambda comm: b"last error"
        for name, types in FUNCTIONS.items():
            body = getattr(self, f"_{name}", lambda *_: None)
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._noting(name, body)))

    def names(self) -> list[str]:
        return [name.removeprefix("nccl") for name, _ in self.calls]

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == f"nccl{name}"]

    def _noting(self, name: str, body: Callable[..., Any]) -> Callable[..., int]:
        is_begun = name.startswith("ncclCommInit") or name in (
            "ncclGroupEnd", "ncclAllReduce", "ncclAllGather", "ncclBroadcast",
        )  # fmt: skip

        def call(*arguments: Any) -> int:
            self.threads[name] = threading.current_thread().name
            if name != "ncclCommGetAsyncError":
                self.calls.append((name, arguments))
            body(*arguments)
            if name in self.results:
                return self.results[name]
            if is_begun:
                self._in_progress = 10**9 if name in self.stuck else self.looks
                return IN_PROGRESS
            return SUCCESS

        return call

    def _ncclGetVersion(self, version: Any) -> None:
        version[0] = self.results.get("version", 22809)

    def _ncclGetUniqueId(self, unique_id: Any) -> None:
        ctypes.memmove(unique_id, UNIQUE_ID, len(UNIQUE_ID))

    def _ncclCommInitRankConfig(self, comm: Any, world_size: int, unique_id: Any, rank: int, config: Any) -> None:
        comm[0] = COMM
        self.config = {name: getattr(config[0], name) for name, *_ in config[0]._fields_}
        self.calls[-1] = "ncclCommInitRankConfig", (world_size, bytes(unique_id), rank)

    def _ncclCommGetAsyncError(self, comm: int, found: Any) -> None:
        self._in_progress -= self._in_progress > 0
        found[0] = IN_PROGRESS if self._in_progress else self.error

    def _ncclCommRevoke(self, comm: int, flags: int) -> None:
        self.kernels_run, self._in_progress = False, self.looks

    def _ncclCommAbort(self, comm: int) -> None:
        self.in_abort.set()
        self.may_abort.wait(60)
        self.kernels_run = False

    def _ncclSend(self, address: int, size: int, dtype: int, peer: int, comm: int, stream: int) -> None:
        self._own = (address, size) if peer == self.rank else self._own

    def _ncclRecv(self, address: int, size: int, dtype: int, peer: int, comm: int, stream: int) -> None:
        if peer == self.rank:
            sent, sent_size = self._own
            ctypes.memmove(address, sent, min(size, sent_size))

    def _ncclAllGather(self, sent: int, received: int, size: int, dtype: int, comm: int, stream: int) -> None:
        ctypes.memmove(received + self.rank * size, sent, size)

    _own = (0, 0)


class FakeEvent:
    """Reached once no kernel runs."""

    def __init__(self, nccl: FakeNccl) -> None:
        self._nccl = nccl

    def query(self) -> bool:
        return not self._nccl.kernels_run


class FakeStream:
    """A stream on the host's memory; notes its calls among those of NCCL."""

    device = torch.device("cpu")
    handle = STREAM

    def __init__(self, nccl: FakeNccl) -> None:
        self._nccl = nccl

    def use_here(self) -> None:
        self._nccl.calls.append(("use_here", ()))

    def follow(self) -> None:
        self._nccl.calls.append(("follow", ()))

    def mark(self) -> FakeEvent:
        self._nccl.calls.append(("mark", ()))
        return FakeEvent(self._nccl)


def backend_over(nccl: FakeNccl) -> NcclBackend:
    """A backend that has not been formed."""
    make: Any = lambda: FakeStream(nccl)  # noqa: E731
    return NcclBackend(lambda: NcclLibrary(nccl), make)
