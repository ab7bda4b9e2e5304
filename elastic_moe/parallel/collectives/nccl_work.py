"""One operation over NCCL: the stream it runs on, the memory it uses, and the call that starts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch

from elastic_moe.parallel.collectives.backend import (
    AllGather,
    AllReduce,
    AllToAll,
    BackendError,
    Broadcast,
    Operation,
)
from elastic_moe.parallel.collectives.nccl_library import DTYPES, REDUCTIONS, NcclLibrary

Launch = Callable[[ctypes.c_void_p, int], None]  # (communicator, stream)


class Event(Protocol):
    """A mark in a stream, as `torch.cuda.Event`."""

    def query(self) -> bool: ...


class CudaStream:
    """A stream of high priority on the thread's current GPU, and what the backend asks of it."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError("there is no GPU that torch can use")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    @property
    def handle(self) -> int:
        """The address of the `cudaStream_t`."""
        return self._stream.cuda_stream

    def use_here(self) -> None:
        """Make the stream's GPU the thread's current one."""
        torch.cuda.set_device(self.device)

    def follow(self) -> None:
        """Order the stream behind the work that the caller's current stream holds."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def mark(self) -> Event:
        """An event behind all that the stream holds."""
        return self._stream.record_event()


@dataclass(eq=False)
class NcclWork:
    """An operation under way.

    Attributes:
        buffers: memory on the GPU that the operation reads and writes.
        results: (buffer, tensor of the caller) that take the outputs.
        end: reached when the kernel has left; None until it has been launched.
    """

    buffers: tuple[torch.Tensor, ...]
    results: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    end: Event | None = None

    @property
    def has_ended(self) -> bool:
        return self.end is not None and self.end.query()


def prepare(library: NcclLibrary, operation: Operation, device: torch.device) -> tuple[NcclWork, Launch]:
    """The operation's buffers, and the call that starts it. Inputs are copied where NCCL cannot read them."""
    match operation:
        case AllReduce(tensor, reduction):
            if tensor.dtype not in DTYPES:
                raise TypeError(f"NCCL does not reduce {tensor.dtype}")
            buffers, out = (_readable(tensor, device),), tensor
            launch = partial(
                library.all_reduce,
                buffers[0].data_ptr(),
                tensor.numel(),
                DTYPES[tensor.dtype],
                REDUCTIONS[reduction],
            )
        case AllGather(out, inp):
            buffers = _writable(out, device), _readable(inp, device)
            launch = partial(library.all_gather, buffers[1].data_ptr(), buffers[0].data_ptr(), _bytes(inp))
        case AllToAll(out, inp, out_splits, in_splits):
            buffers = _writable(out, device), _readable(inp, device)
            launch = partial(library.exchange, _parts(buffers[1], in_splits), _parts(buffers[0], out_splits))
        case Broadcast(tensor, src):
            buffers, out = (_readable(tensor, device),), tensor
            launch = partial(library.broadcast, buffers[0].data_ptr(), _bytes(tensor), src)
    is_direct = buffers[0].data_ptr() == out.data_ptr()
    return NcclWork(buffers, () if is_direct else ((buffers[0], out.detach()),)), launch


def _readable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor itself where NCCL can use it, else a copy on the GPU."""
    return tensor.detach().to(device).contiguous()


def _writable(out: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor itself where NCCL can write to it, else memory of its shape on the GPU."""
    if out.device == device and out.is_contiguous():
        return out.detach()
    return torch.empty(out.shape, dtype=out.dtype, device=device)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parts(buffer: torch.Tensor, splits: Sequence[int]) -> list[tuple[int, int]]:
    """(address, number of bytes) of consecutive parts of so many rows."""
    row_bytes = prod(buffer.shape[1:]) * buffer.element_size()
    parts: list[tuple[int, int]] = []
    address = buffer.data_ptr()
    for rows in splits:
        parts.append((address, rows * row_bytes))
        address += rows * row_bytes
    return parts
