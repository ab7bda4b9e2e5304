"""The backend over NCCL, on a stand-in for the library: what is called, in which order and thread, and what ends it.

Not tested here: that the names and types are those of a CUDA build's library, which this machine need not have, and
what NCCL itself does. `scripts/benchmarks/gpu_nccl.py` does that on a GPU.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.errors import GroupAborted
from elastic_moe.parallel.collectives import nccl as nccl_module
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import (
    AllGather,
    AllReduce,
    AllToAll,
    BackendError,
    Broadcast,
    GroupMember,
    Operation,
    Reduction,
)
from elastic_moe.parallel.collectives.gloo import GlooBackend
from elastic_moe.parallel.collectives.group import BACKENDS, Group
from elastic_moe.parallel.collectives.nccl import NCCL_BACKENDS, NcclBackend
from elastic_moe.parallel.collectives.nccl_library import Config, NcclLibrary, UniqueId, load, nonblocking_config
from elastic_moe.parallel.collectives.nccl_work import NcclWork
from elastic_moe.parallel.collectives.store import Rendezvous
from tests.unit.parallel.fake_nccl import COMM, STREAM, UNIQUE_ID, FakeNccl, backend_over
from tests.unit.parallel.test_group import FakeBackend

ALONE = GroupMember(3, 0, 1)
NOWHERE = Rendezvous("nowhere", 0, "", 60.0)
PATIENCE_S = 60.0


def formed(nccl: FakeNccl) -> NcclBackend:
    """A backend of one rank that is ready, with the calls of forming forgotten."""
    backend = backend_over(nccl)
    backend.form(ALONE, NOWHERE)
    nccl.calls.clear()
    return backend


def complete(backend: NcclBackend, operation: Operation) -> None:
    finish(backend, backend.begin(operation))


def finish(backend: NcclBackend, work: NcclWork, slice_s: float = 0.02) -> None:
    while not backend.poll(work, slice_s):
        pass


# --- the table of functions ---


def test_structures_have_the_library_s_layout() -> None:
    offsets = {field[0]: getattr(Config, field[0]).offset for field in Config._fields_}
    assert list(offsets.values()) == [0, 8, 12, 16, 20, 24, 28, 32, 40, 44, 48, 56, 60, 64, 68, 72, 76]
    assert offsets["net_name"] == 32
    assert offsets["comm_name"] == 48
    assert nonblocking_config().size == 80
    assert len(bytes(UniqueId())) == 128


def test_a_missing_function_is_named() -> None:
    nccl = FakeNccl()
    del nccl.ncclCommRevoke  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BackendError, match=r"libnccl.so.2 has no ncclCommRevoke: NCCL 2\.28\.9 or newer is needed"):
        NcclLibrary(nccl)


def test_an_old_library_is_refused() -> None:
    nccl = FakeNccl()
    nccl.results["version"] = 22703
    with pytest.raises(BackendError, match=r"NCCL 2\.27\.3 is too old"):
        NcclLibrary(nccl)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings NCCL")
def test_without_cuda_the_sentence_says_so() -> None:
    with pytest.raises(BackendError, match="built without CUDA"):
        load()
    backends = {**NCCL_BACKENDS, "cpu": FakeBackend}
    with pytest.raises(GroupAborted, match=r"forming generation 1: .* built without CUDA"):
        Group(GroupMember(1, 0, 2), NOWHERE, AbortSignal(), device=torch.device("cuda"), backends=backends)


def test_nccl_has_to_be_chosen() -> None:
    assert "cuda" not in BACKENDS
    assert NCCL_BACKENDS["cuda"] is NcclBackend
    assert NCCL_BACKENDS["cpu"] is GlooBackend


# --- forming ---


class RendezvousAt:
    """A rendezvous of its own, as a context manager."""

    def __enter__(self) -> Rendezvous:
        self._server = RendezvousServer("127.0.0.1", "secret")
        self._server.start()
        return Rendezvous("127.0.0.1", self._server.port, "secret", PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        self._server.close()


def test_forming_alone() -> None:
    nccl = FakeNccl()
    nccl.looks = 3
    backend = backend_over(nccl)
    backend.form(ALONE, NOWHERE)
    connecting = ["follow", "GroupStart", "Send", "Recv", "GroupEnd", "mark", "follow", "AllReduce", "mark"]
    assert nccl.names() == ["GetVersion", "GetUniqueId", "CommInitRankConfig", *connecting]
    assert nccl.arguments("CommInitRankConfig") == [(1, UNIQUE_ID, 0)]
    assert nccl.config["size"] == 80
    assert nccl.config["magic"] == 0xCAFEBEEF
    assert nccl.config["version"] == 22800
    assert nccl.config["blocking"] == 0
    assert nccl.config["max_ctas"] == nccl.config["nvlink_centric_sched"] == -(2**31)
    assert nccl.config["net_name"] is None
    backend.release()


def test_members_share_the_first_one_s_id_beside_the_host_s_backend() -> None:
    fakes = [FakeNccl(rank, 3) for rank in range(3)]

    def form(rank: int, rendezvous: Rendezvous) -> None:
        member = GroupMember(3, rank, 3, "node:0-1-2.0/")
        host, backend = GlooBackend(), backend_over(fakes[rank])
        host.form(member, rendezvous)
        backend.form(member, rendezvous)
        backend.release()
        host.release()

    with RendezvousAt() as rendezvous, ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(form, rank, rendezvous) for rank in range(3)]:
            future.result(PATIENCE_S)
    assert [fake.arguments("CommInitRankConfig") for fake in fakes] == [[(3, UNIQUE_ID, rank)] for rank in range(3)]
    assert ["GetUniqueId" in fake.names() for fake in fakes] == [True, False, False]


def test_a_failure_to_begin_says_what_nccl_says() -> None:
    nccl = FakeNccl()
    nccl.results["ncclCommInitRankConfig"] = 1
    backend = backend_over(nccl)
    with pytest.raises(BackendError, match="NCCL error 1: error string 1; last error"):
        backend.form(ALONE, NOWHERE)
    backend.release()
    assert nccl.names()[-3:] == ["use_here", "CommAbort", "mark"]


def test_an_error_while_forming() -> None:
    nccl = FakeNccl()
    nccl.error = 6
    backend = backend_over(nccl)
    with pytest.raises(BackendError, match="NCCL error 6"):
        backend.form(ALONE, NOWHERE)
    backend.release()


@pytest.mark.parametrize("function", ["ncclCommInitRankConfig", "ncclGroupEnd", "ncclAllReduce"])
def test_forming_ends_in_time(function: str) -> None:
    nccl = FakeNccl()
    nccl.stuck = {function}
    backend = backend_over(nccl)
    with pytest.raises(BackendError, match="has not connected all members in time"):
        backend.form(ALONE, Rendezvous("nowhere", 0, "", 0.01))
    backend.release()
    assert "CommAbort" in nccl.names()


@pytest.mark.parametrize("function", ["ncclCommInitRankConfig", "ncclGroupEnd", "ncclAllReduce"])
def test_an_abort_ends_forming(function: str) -> None:
    nccl = FakeNccl()
    nccl.stuck = {function}
    backend = backend_over(nccl)

    def end() -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while function not in nccl.threads and time.monotonic() < deadline_s:
            time.sleep(0.001)
        backend.abort()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(BackendError, match="aborted"):
        backend.form(ALONE, NOWHERE)
    thread.join()
    backend.release()
    assert "CommRevoke" not in nccl.names(), "it would meet what is still being launched"
    assert nccl.names()[-3:] == ["use_here", "CommAbort", "mark"]


def test_an_abort_ends_the_wait_for_an_absent_member() -> None:
    nccl = FakeNccl(1, 2)
    backend = backend_over(nccl)
    with RendezvousAt() as rendezvous:
        threading.Timer(0.05, backend.abort).start()
        with pytest.raises(BackendError, match="aborted"):
            backend.form(GroupMember(1, 1, 2), rendezvous)
        backend.release()
    assert nccl.names() == ["GetVersion"], "no communicator was begun"


def test_an_abort_before_forming() -> None:
    nccl = FakeNccl()
    backend = backend_over(nccl)
    backend.abort()
    with pytest.raises(BackendError, match="aborted"):
        backend.form(ALONE, NOWHERE)
    backend.release()
    backend.release()
    backend.abort()
    assert nccl.calls == []


# --- operations ---


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.float32, 7), (torch.bfloat16, 9), (torch.float16, 6), (torch.float64, 8),
        (torch.uint8, 1), (torch.int32, 2), (torch.int64, 4),
    ],
)  # fmt: skip
def test_reductions_of_all_types(dtype: torch.dtype, code: int) -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    tensor = torch.ones(5, 2, dtype=dtype)
    for reduction, op in ((Reduction.SUM, 0), (Reduction.MAX, 2)):
        complete(backend, AllReduce(tensor, reduction))
        address = tensor.data_ptr()
        assert nccl.arguments("AllReduce")[-1] == (address, address, 10, code, op, COMM, STREAM)
    with pytest.raises(TypeError, match="does not reduce"):
        backend.begin(AllReduce(tensor.bool(), Reduction.SUM))
    backend.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_moves(dtype: torch.dtype) -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    inp = torch.tensor([[1, 0], [1, 1], [0, 1]]).to(dtype)
    for inp_now in (inp, inp.T.contiguous().T):
        gathered, exchanged = torch.zeros(1, 3, 2, dtype=dtype), torch.zeros(2, 3, dtype=dtype).T
        complete(backend, AllGather(gathered, inp_now))
        complete(backend, AllToAll(exchanged, inp_now, [3], [3]))
        assert torch.equal(gathered[0], inp)
        assert torch.equal(exchanged, inp), "where it is not contiguous too"
    complete(backend, Broadcast(inp, 0))
    assert nccl.arguments("Broadcast")[-1] == (
        inp.data_ptr(),
        inp.data_ptr(),
        6 * inp.element_size(),
        1,
        0,
        COMM,
        STREAM,
    )
    backend.release()


def test_uneven_parts_go_to_their_ranks() -> None:
    nccl = FakeNccl(1, 3)
    with RendezvousAt() as rendezvous, ThreadPoolExecutor(3) as pool:
        members = [nccl if rank == 1 else FakeNccl(rank, 3) for rank in range(3)]
        backends = [backend_over(member) for member in members]
        list(pool.map(lambda rank: backends[rank].form(GroupMember(1, rank, 3), rendezvous), range(3)))
    nccl.calls.clear()
    inp, out = torch.arange(10.0).reshape(5, 2), torch.zeros(4, 2)
    complete(backends[1], AllToAll(out, inp, [1, 3, 0], [0, 3, 2]))
    sent, received = inp.data_ptr(), out.data_ptr()
    assert nccl.arguments("Send") == [(sent, 24, 1, 1, COMM, STREAM), (sent + 24, 16, 1, 2, COMM, STREAM)]
    assert nccl.arguments("Recv") == [(received, 8, 1, 0, COMM, STREAM), (received + 8, 24, 1, 1, COMM, STREAM)]
    assert torch.equal(out[1:], inp[:3])
    complete(backends[1], AllToAll(out[:0], inp[:0], [0, 0, 0], [0, 0, 0]))
    for backend in backends:
        backend.release()


def test_the_group_ends_also_after_an_error_in_it() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.results["ncclSend"] = 4
    with pytest.raises(BackendError, match="NCCL error 4"):
        backend.begin(AllToAll(torch.zeros(1), torch.ones(1), [1], [1]))
    assert nccl.names()[-1] == "GroupEnd"
    backend.release()
    assert "CommAbort" in nccl.names()


def test_the_end_is_marked_once_the_kernel_is_in_the_stream() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.looks, nccl.kernels_run = 5, True
    work = backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    assert nccl._in_progress == 0
    assert nccl.names() == ["follow", "AllReduce", "mark"]
    assert not backend.poll(work, 0.01)
    assert not backend.poll(work, 0.0)
    nccl.kernels_run = False
    assert backend.poll(work, 0.01)
    backend.release()
    assert nccl.names()[-3:] == ["use_here", "CommDestroy", "mark"]


@pytest.mark.parametrize("kernels_run", [True, False])
def test_a_lost_peer_is_noticed_while_waiting_and_at_the_end(kernels_run: bool) -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.kernels_run = kernels_run
    work = backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    nccl.error = 6
    with pytest.raises(BackendError, match="NCCL error 6"):
        finish(backend, work)
    backend.release()
    assert "CommAbort" in nccl.names()


# --- aborts and the end ---


def test_an_abort_while_the_main_thread_polls_only_sets_the_flag() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.kernels_run = True
    work = backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    threading.Timer(0.05, backend.abort).start()
    began_s = time.monotonic()
    with pytest.raises(BackendError, match="aborted"):
        finish(backend, work, 1.0)
    assert time.monotonic() - began_s < 0.9
    with pytest.raises(BackendError, match="aborted"):
        backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    backend.release()
    assert nccl.names().count("CommRevoke") <= 1, "the main thread may be between two looks"
    assert nccl.threads["ncclCommAbort"] == "nccl-end"


def test_what_is_still_being_launched_is_never_revoked() -> None:
    """The main thread may leave NCCL between the abort's flag and its look at where the main thread is."""
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.stuck, nccl.kernels_run = {"ncclAllReduce"}, True
    threading.Timer(0.05, backend.abort).start()
    with pytest.raises(BackendError, match="aborted"):
        backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    backend.abort()
    backend.release()
    assert nccl.names() == ["follow", "AllReduce", "use_here", "CommAbort", "mark"]


def test_an_abort_frees_a_main_thread_that_waits_for_the_device() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.kernels_run = True
    nccl.looks = 2
    work = backend.begin(AllReduce(torch.ones(1), Reduction.SUM))
    thread = threading.Thread(target=lambda: (backend.abort(), backend.abort()), name="control")
    thread.start()
    deadline_s = time.monotonic() + PATIENCE_S
    while nccl.kernels_run and time.monotonic() < deadline_s:  # as torch.cuda.synchronize
        time.sleep(0.001)
    thread.join()
    assert nccl.names() == ["follow", "AllReduce", "mark", "CommRevoke"]
    assert nccl.threads["ncclCommRevoke"] == "control"
    with pytest.raises(BackendError, match="aborted"):
        backend.poll(work, 0.02)
    backend.release()
    assert nccl.names()[-4:] == ["CommRevoke", "use_here", "CommAbort", "mark"]
    assert nccl._in_progress == 0, "the revocation had ended before the abort"


def test_an_abort_of_an_idle_group_wakes_nobody() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    complete(backend, AllReduce(torch.ones(1), Reduction.SUM))
    backend.abort()
    assert "CommRevoke" not in nccl.names()
    backend.release()
    assert "CommAbort" in nccl.names()
    backend.release()
    backend.abort()
    assert nccl.names().count("CommAbort") == 1


def test_release_waits_for_a_hanging_abort_only_for_a_while_and_keeps_the_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_module, "DRAIN_S", 0.05)
    nccl = FakeNccl()
    backend = formed(nccl)
    nccl.kernels_run = True
    nccl.may_abort.clear()
    tensor = torch.ones(4, 4)[:, 0]  # copied for the operation
    work = backend.begin(AllReduce(tensor, Reduction.SUM))
    buffer = weakref.ref(work.buffers[0])
    del work
    began_s = time.monotonic()
    backend.release()
    assert 0.04 < time.monotonic() - began_s < 5
    gc.collect()
    assert buffer() is not None
    nccl.may_abort.set()
    deadline_s = time.monotonic() + PATIENCE_S
    while buffer() is not None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert buffer() is None


def test_a_lost_gpu_is_an_error_of_the_backend() -> None:
    nccl = FakeNccl()
    backend = formed(nccl)
    work = backend.begin(AllReduce(torch.ones(1), Reduction.SUM))

    class Lost:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access")

    work.end = Lost()
    with pytest.raises(BackendError, match="illegal memory access"):
        backend.poll(work, 0.02)
    backend.release()
    assert "CommAbort" in nccl.names()
