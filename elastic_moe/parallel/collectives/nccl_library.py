"""NCCL's C functions over ctypes, on the library that torch has loaded: a table of names and types, and a thin class.

torch's own `ProcessGroupNCCL` is not used: it cannot be aborted while it forms, its timed wait aborts the communicator,
and its watchdog ends the process. ctypes lets go of the interpreter's lock during a call, so the control connection's
thread runs while the main thread is inside NCCL.

Types and numbers are those of `nccl.h` at v2.28.9-1, and the same at v2.29.7-1. A CUDA build of torch is needed to load
the library; the tests here call the same table through C function pointers instead.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from elastic_moe.parallel.collectives.backend import BackendError, Reduction

SONAME = "libnccl.so.2"  # torch has loaded it; the loader finds it again by this name
OLDEST = 22809  # has ncclCommRevoke; older ones of 2.28 crash when communicators are made anew in a process
SUCCESS, IN_PROGRESS = 0, 7
UNIQUE_ID_BYTES = 128
CONFIG_MAGIC, CONFIG_VERSION, UNSET = 0xCAFEBEEF, 22800, -(2**31)
UINT8 = 1
DTYPES = {  # of sums and maxima; what is only moved goes as bytes
    torch.int8: 0,
    torch.uint8: UINT8,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
REDUCTIONS = {Reduction.SUM: 0, Reduction.MAX: 2}


class UniqueId(ctypes.Structure):
    """Names a communicator that is being formed; passed by value."""

    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class Config(ctypes.Structure):
    """`ncclConfig_t` of 2.28, 80 bytes. Newer libraries read `size` bytes and take their defaults for the rest."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
        ("comm_name", ctypes.c_char_p),
        ("collnet_enable", ctypes.c_int),
        ("cta_policy", ctypes.c_int),
        ("shrink_share", ctypes.c_int),
        ("nvls_ctas", ctypes.c_int),
        ("channels_per_net_peer", ctypes.c_int),
        ("nvlink_centric_sched", ctypes.c_int),
    )


def nonblocking_config() -> Config:
    """Calls on the communicator return at once with `IN_PROGRESS`; all else is NCCL's default."""
    config = Config()
    for field in Config._fields_:
        if field[1] is ctypes.c_int:
            setattr(config, field[0], UNSET)
    config.size, config.magic, config.version = ctypes.sizeof(Config), CONFIG_MAGIC, CONFIG_VERSION
    config.blocking = 0
    return config


_COMM = _BUFFER = _STREAM = ctypes.c_void_p
_COUNT, _INT = ctypes.c_size_t, ctypes.c_int
FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name -> types of the arguments; all return an ncclResult_t
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(UniqueId),),
    "ncclCommInitRankConfig": (ctypes.POINTER(_COMM), _INT, UniqueId, _INT, ctypes.POINTER(Config)),
    "ncclCommGetAsyncError": (_COMM, ctypes.POINTER(_INT)),
    "ncclCommRevoke": (_COMM, _INT),
    "ncclCommAbort": (_COMM,),
    "ncclCommDestroy": (_COMM,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (_BUFFER, _COUNT, _INT, _INT, _COMM, _STREAM),
    "ncclRecv": (_BUFFER, _COUNT, _INT, _INT, _COMM, _STREAM),
    "ncclAllReduce": (_BUFFER, _BUFFER, _COUNT, _INT, _INT, _COMM, _STREAM),
    "ncclAllGather": (_BUFFER, _BUFFER, _COUNT, _INT, _COMM, _STREAM),
    "ncclBroadcast": (_BUFFER, _BUFFER, _COUNT, _INT, _INT, _COMM, _STREAM),
}
TEXTS: dict[str, tuple[Any, ...]] = {"ncclGetErrorString": (_INT,), "ncclGetLastError": (_COMM,)}  # return a char*


class NcclLibrary:
    """The functions with Python's types. Every call returns at once, but for `abort` and `destroy`.

    Args:
        native: the loaded library, or what has its functions.

    Raises:
        BackendError: a function is missing, or the library is too old.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        for table, result in ((FUNCTIONS, ctypes.c_int), (TEXTS, ctypes.c_char_p)):
            for name, types in table.items():
                try:
                    function = getattr(native, name)
                except AttributeError as error:
                    raise BackendError(f"{SONAME} has no {name}: NCCL {_dotted(OLDEST)} or newer is needed") from error
                function.argtypes, function.restype = types, result
        self.version = self._get_version()
        if self.version < OLDEST:
            raise BackendError(f"NCCL {_dotted(self.version)} is too old: {_dotted(OLDEST)} or newer is needed")

    def _get_version(self) -> int:
        found = ctypes.c_int()
        self._check(self._native.ncclGetVersion(ctypes.byref(found)))
        return found.value

    def unique_id(self) -> bytes:
        """A new id. NCCL waits for its members in a thread that nothing ends: call it once all members are there."""
        found = UniqueId()
        self._check(self._native.ncclGetUniqueId(ctypes.byref(found)))
        return bytes(found)

    def init(self, comm: ctypes.c_void_p, world_size: int, unique_id: bytes, rank: int) -> None:
        """Begin to form a communicator on the thread's current GPU, and write it to `comm`, also where this fails.

        `comm` must live as long as the communicator, for a thread of NCCL writes to it.
        """
        config, name = nonblocking_config(), UniqueId.from_buffer_copy(unique_id)
        self._check(
            self._native.ncclCommInitRankConfig(ctypes.byref(comm), world_size, name, rank, ctypes.byref(config)), comm
        )

    def has_settled(self, comm: ctypes.c_void_p) -> bool:
        """Whether what was begun on the communicator has been launched, or has formed it.

        Raises:
            BackendError: it has failed, or an earlier operation has.
        """
        found = ctypes.c_int()
        self._check(self._native.ncclCommGetAsyncError(comm, ctypes.byref(found)), comm)
        self._check(found.value, comm)
        return found.value != IN_PROGRESS

    def revoke(self, comm: ctypes.c_void_p) -> None:
        """Make the kernels of all operations leave, with garbage in their outputs. Errors do not matter any more."""
        self._native.ncclCommRevoke(comm, 0)

    def abort(self, comm: ctypes.c_void_p) -> None:
        """Make the kernels leave, and free the communicator. Blocks while NCCL's threads end. Errors do not matter."""
        self._native.ncclCommAbort(comm)

    def destroy(self, comm: ctypes.c_void_p) -> None:
        """Free the communicator once the peers have all that was sent to them. Blocks for as long."""
        self._native.ncclCommDestroy(comm)

    def all_reduce(self, address: int, count: int, dtype: int, op: int, comm: ctypes.c_void_p, stream: int) -> None:
        """In place, on `count` elements."""
        self._check(self._native.ncclAllReduce(address, address, count, dtype, op, comm, stream), comm)

    def all_gather(self, sent: int, received: int, num_bytes: int, comm: ctypes.c_void_p, stream: int) -> None:
        """Every rank's `num_bytes`, one after the other."""
        self._check(self._native.ncclAllGather(sent, received, num_bytes, UINT8, comm, stream), comm)

    def broadcast(self, address: int, num_bytes: int, src: int, comm: ctypes.c_void_p, stream: int) -> None:
        """In place."""
        self._check(self._native.ncclBroadcast(address, address, num_bytes, UINT8, src, comm, stream), comm)

    def exchange(
        self, sends: list[tuple[int, int]], receives: list[tuple[int, int]], comm: ctypes.c_void_p, stream: int
    ) -> None:
        """Send to and receive from every rank: (address, number of bytes) in the order of the ranks.

        Parts of no bytes are left out. The group is ended also after an error, for it belongs to the thread.
        """
        results = [self._native.ncclGroupStart()]
        for function, parts in ((self._native.ncclSend, sends), (self._native.ncclRecv, receives)):
            for peer, (address, num_bytes) in enumerate(parts):
                if num_bytes:
                    results.append(function(address, num_bytes, UINT8, peer, comm, stream))
        results.append(self._native.ncclGroupEnd())
        for result in results:
            self._check(result, comm)

    def _check(self, result: int, comm: ctypes.c_void_p | None = None) -> None:
        """Raises BackendError with NCCL's own words for anything but success and `IN_PROGRESS`."""
        if result in (SUCCESS, IN_PROGRESS):
            return
        texts = [self._native.ncclGetErrorString(result), self._native.ncclGetLastError(comm)]
        words = [text.decode(errors="replace").strip() for text in texts if text]
        raise BackendError(f"NCCL error {result}: {'; '.join(word for word in words if word)}")


def load() -> NcclLibrary:
    """The library that torch has loaded.

    Raises:
        BackendError: there is none, or it lacks a function, or is too old.
    """
    if torch.version.cuda is None:
        raise BackendError(f"torch {torch.__version__} is built without CUDA, so it brings no {SONAME}")
    try:
        return NcclLibrary(ctypes.CDLL(SONAME))
    except OSError as error:
        raise BackendError(f"torch {torch.__version__} has not loaded {SONAME}: {error}") from error


def _dotted(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
