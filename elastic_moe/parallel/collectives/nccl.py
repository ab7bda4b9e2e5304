"""Collectives over NCCL, for tensors on the GPU: one non-blocking communicator per group, thrown away with it.

`choice.py` adds it to a `Group` where all members can use it. See `CollectiveBackend` for the contract.

Who may call NCCL when:
- The main thread marks with `_inside` that it is in NCCL or polls it. There it looks at the abort flag every
  millisecond, so an abort need only set the flag.
- Outside, the main thread may sit in a wait for the device, behind a kernel that waits for a dead peer. There the
  aborting thread calls `ncclCommRevoke`, once: the kernels leave, and the wait ends. It is called only while nothing
  that was begun is still being launched, for NCCL 2.28 frees the launch's record twice otherwise (`ncclGroupJobAbort`).
- `release` gives the communicator to a thread of its own, which frees it, because that call blocks while NCCL's threads
  end. The main thread waits for it for `DRAIN_S` at most; after that the GPU is most likely lost.

What NCCL does at an end (source, v2.28.9-1), and what follows:
- An end event says that this rank's kernel has left, and not that its data have left the host: a thread of NCCL sends
  them on (`proxy.cc`). `ncclCommAbort` drops what is unsent, `ncclCommDestroy` sends it first. So a group that is
  released in health is destroyed, and any other is aborted. A destroy waits for ever for a peer that hangs; its thread
  is a daemon and is left behind.
- The kernels of an aborted rank leave as if they were done, and their peers may then complete with wrong bytes (see
  "Garbage after an abort" in `backend.py`).

Run on one GPU with NCCL 2.28.9, by ranks that share it (`scripts/benchmarks/gpu_nccl.py`, and whole runs in
`tests/gpu/test_run.py`), and over a stand-in for NCCL (`tests/unit/parallel/fake_nccl.py`). Not run: several GPUs,
whose ranks map each other's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elastic_moe.parallel.collectives import nccl_library
from elastic_moe.parallel.collectives.backend import (
    SLICE_S,
    AllReduce,
    AllToAll,
    BackendError,
    CollectiveBackend,
    GroupMember,
    Operation,
    Reduction,
)
from elastic_moe.parallel.collectives.forming import in_thread
from elastic_moe.parallel.collectives.group import BACKENDS
from elastic_moe.parallel.collectives.nccl_library import NcclLibrary
from elastic_moe.parallel.collectives.nccl_work import CudaStream, NcclWork, prepare
from elastic_moe.parallel.collectives.store import GroupStore, Rendezvous

SPIN_S = 50e-6  # of looking without a pause, for small operations
PAUSE_S = 1e-3  # the longest pause between two looks
HEALTH_S = 5e-3  # between two questions to NCCL about errors
DRAIN_S = 2.0  # the longest that `release` waits for kernels to leave, which may still write to the caller's tensors
CLOSE_S = 0.5  # the longest that it waits where nothing is under way


class NcclBackend:
    """One NCCL communicator, on the GPU that is current where `form` is called.

    Args:
        load: gives NCCL's functions.
        make_stream: gives the stream for the operations.
    """

    def __init__(
        self,
        load: Callable[[], NcclLibrary] = nccl_library.load,
        make_stream: Callable[[], CudaStream] = CudaStream,
    ) -> None:
        self._load, self._make_stream = load, make_stream
        self._library: NcclLibrary | None = None
        self._stream: CudaStream | None = None
        self._comm = ctypes.c_void_p()  # NCCL writes to it while the communicator forms
        self._store: GroupStore | None = None
        self._aborted = threading.Event()
        self._lock = threading.Lock()  # of the four below; no call that can block is made under it
        self._is_inside = False
        self._is_launching = False  # stays so where an error or an abort comes in between
        self._revoked = False
        self._released = False
        self._failed = False
        self._deadline_s: float | None = None  # of forming
        self._under_way: set[NcclWork] = set()

    def form(self, member: GroupMember, rendezvous: Rendezvous) -> None:
        self._check_aborted()
        with self._errors():
            library = self._library = self._load()
            stream = self._stream = self._make_stream()
            unique_id = self._meet(library, member, rendezvous)
            self._deadline_s = time.monotonic() + rendezvous.timeout_s
            with self._inside():
                self._is_launching = True
                library.init(self._comm, member.world_size, unique_id, member.rank)
                self._settle(library)
            self._connect(member.world_size, stream.device)
            self._deadline_s = None

    def begin(self, operation: Operation) -> NcclWork:
        self._check_aborted()
        library, stream = self._library, self._stream
        assert library is not None, "the group is not formed"
        assert stream is not None
        with self._errors():
            self._under_way = {other for other in self._under_way if not other.has_ended}
            work, launch = prepare(library, operation, stream.device)
            stream.follow()
            self._under_way.add(work)  # before the launch: an abort may come between it and its end's mark
            with self._inside():
                self._is_launching = True
                launch(self._comm, stream.handle)
                self._settle(library)
            work.end = stream.mark()  # only now is the kernel in the stream
        return work

    def poll(self, work: NcclWork, timeout_s: float) -> bool:
        assert self._library is not None
        began_s = checked_s = time.monotonic()
        with self._errors():
            while True:
                self._check_aborted()
                now_s, ended = time.monotonic(), work.has_ended
                if ended or now_s - checked_s >= HEALTH_S:
                    with self._inside():  # its end looks at the abort flag, last of all
                        self._library.has_settled(self._comm)
                    checked_s = now_s
                if ended:
                    break
                if now_s - began_s >= timeout_s:
                    return False
                _pause(now_s - began_s)
            self._under_way.discard(work)
            for buffer, tensor in work.results:
                tensor.copy_(buffer)
        return True

    def abort(self) -> None:
        """Set the flag, and wake a main thread that may wait for the device. Frees nothing."""
        self._aborted.set()
        if (store := self._store) is not None:
            store.cancel()
        with self._lock:  # of the main thread's way into NCCL, and of `release`
            if self._under_way and not (self._is_inside or self._is_launching or self._revoked or self._released):
                assert self._library is not None
                self._revoked = True
                self._library.revoke(self._comm)

    def release(self) -> None:
        """Free the communicator in a thread, and wait for that for a while: as a rule some milliseconds.

        The buffers of operations under way stay alive until their kernels have left, however long that takes.
        """
        with self._lock:
            if self._released:
                return
            self._released = True
        if not self._comm:
            return
        assert self._library is not None
        assert self._stream is not None
        healthy = self._is_healthy()
        end = _End(self._library, self._stream, self._comm, self._under_way, healthy, self._revoked)
        self._under_way = set()
        thread = threading.Thread(target=end.run, name="nccl-end", daemon=True)
        thread.start()
        thread.join(CLOSE_S if healthy else DRAIN_S)

    def _is_healthy(self) -> bool:
        """Whether all operations have ended, and the group with them."""
        try:
            return not (self._aborted.is_set() or self._failed) and all(work.has_ended for work in self._under_way)
        except RuntimeError:  # the GPU is lost
            return False

    # --- forming ---

    def _meet(self, library: NcclLibrary, member: GroupMember, rendezvous: Rendezvous) -> bytes:
        """The communicator's id, made by rank 0. A thread waits for it, so that an abort need not wait for a socket.

        All members have arrived at the host's backend, so that nobody waits for a member that never comes.
        """
        if member.world_size == 1:
            return library.unique_id()
        return in_thread(lambda: self._spread(library, member, rendezvous), "nccl-form", self._check_aborted)

    def _spread(self, library: NcclLibrary, member: GroupMember, rendezvous: Rendezvous) -> bytes:
        """The store's values are handed out when the last member has asked; rank 0 asks for a word of rank 1."""
        store = GroupStore(rendezvous, f"{member.key_prefix}nccl", member.rank, member.world_size)
        self._store = store
        try:
            self._check_aborted()  # perhaps before the store was there to be cancelled
            if member.rank > 0:
                store.set(f"here/{member.rank}", b"")
                return store.get("id")
            unique_id = library.unique_id()
            store.set("id", unique_id)
            store.wait(["here/1"])
            return unique_id
        finally:
            store.close()

    def _connect(self, world_size: int, device: torch.device) -> None:
        """Use every pair's and the ring's connections once, for NCCL makes them at the first use."""
        sent = torch.zeros(world_size, dtype=torch.int32, device=device)
        ones = [1] * world_size
        for operation in (AllToAll(torch.empty_like(sent), sent, ones, ones), AllReduce(sent, Reduction.SUM)):
            work = self.begin(operation)
            while not self.poll(work, SLICE_S):
                self._check_deadline()

    # --- the way into NCCL ---

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """The main thread is in NCCL: nobody else calls it. Raises BackendError before and after, once aborted."""
        with self._lock:
            self._check_aborted()
            if self._released:
                raise BackendError("released")
            self._is_inside = True
        try:
            yield
        finally:
            with self._lock:
                self._is_inside = False
        self._check_aborted()

    def _settle(self, library: NcclLibrary) -> None:
        """Return once the communicator has formed, or an operation has been launched."""
        began_s = time.monotonic()
        while not library.has_settled(self._comm):
            self._check_aborted()
            self._check_deadline()
            _pause(time.monotonic() - began_s)
        self._is_launching = False

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of CUDA and NCCL spoil the communicator, and become BackendErrors."""
        try:
            yield
        except BackendError:
            self._failed = True
            raise
        except RuntimeError as error:
            self._failed = True
            raise BackendError(str(error)) from error

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise BackendError("aborted")

    def _check_deadline(self) -> None:
        if self._deadline_s is not None and time.monotonic() > self._deadline_s:
            raise BackendError("NCCL has not connected all members in time")


NCCL_BACKENDS: Mapping[str, Callable[[], CollectiveBackend[Any]]] = {**BACKENDS, "cuda": NcclBackend}


@dataclass(frozen=True)
class _End:
    """The end of a communicator; keeps what its kernels may use until they have left."""

    library: NcclLibrary
    stream: CudaStream
    comm: ctypes.c_void_p
    works: set[NcclWork]
    healthy: bool
    revoked: bool

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the GPU is lost; the main thread's next call to it says so
            self.stream.use_here()
            if self.healthy:
                self.library.destroy(self.comm)
            else:
                self._abort()
            last = self.stream.mark()
            while not last.query():
                time.sleep(PAUSE_S)

    def _abort(self) -> None:
        """A revocation that is under way would clear the abort flag: let it end first."""
        deadline_s = time.monotonic() + DRAIN_S / 2
        with contextlib.suppress(BackendError):
            while self.revoked and not self.library.has_settled(self.comm) and time.monotonic() < deadline_s:
                time.sleep(PAUSE_S)
        self.library.abort(self.comm)


def _pause(waited_s: float) -> None:
    """Sleep for a part of the time that was waited already, so that long waits cost little and short ones end soon."""
    if waited_s > SPIN_S:
        time.sleep(min(waited_s / 8, PAUSE_S))
