"""The file format of a shard: safetensors, written and read in pieces.

A file has 8 bytes with the length of its header, a JSON header with each tensor's type, shape and place, then the data
(https://github.com/huggingface/safetensors#format). The header follows from shapes and types alone, so a file is
written without a copy of its tensors, and single tensors are read from an object store.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from elastic_moe.checkpoint.bounded import Activity
from elastic_moe.checkpoint.storage import CorruptCheckpoint, in_pieces

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Place of one tensor in a file.

    Attributes:
        name: `{unit}/{field}`.
        dtype, shape: of the tensor.
        start, stop: its bytes, counted from the beginning of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def unit(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def field(self) -> str:
        return self.name.rpartition("/")[2]


def file_parts(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """The bytes of a file with these tensors: its header, and views of the tensors' memory.

    Args:
        tensors: contiguous tensors on the CPU, by name; they must stay as they are while the parts are used.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    views = [bytes_of(tensor) for tensor in tensors.values() if tensor.numel()]
    return [memoryview(_LENGTH.pack(len(text)) + text), *views]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU that is not empty."""
    assert tensor.is_contiguous(), "a copy would be written or filled"
    return memoryview(cast(bytes, tensor.detach().flatten().view(torch.uint8).numpy()))


def sha256_of(parts: Sequence[memoryview], activity: Activity | None = None) -> str:
    """SHA-256 checksum of a file's parts; other threads run meanwhile."""
    digest = hashlib.sha256()
    for piece in in_pieces(parts):
        digest.update(piece)
        if activity is not None:
            activity.moved(len(piece))
    return digest.hexdigest()


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the header from the first 8 bytes of a file of this size.

    Raises:
        CorruptCheckpoint: no header of a file of this size is so long.
    """
    if len(prefix) != _LENGTH.size:
        raise CorruptCheckpoint("the file ends in its header")
    (length,) = _LENGTH.unpack(prefix)
    if length > min(MAX_HEADER, file_bytes - _LENGTH.size):
        raise CorruptCheckpoint(f"a header of {length} bytes in a file of {file_bytes}")
    return length


def parse_header(header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """Read a header.

    Args:
        header: its bytes, without the 8 bytes before it.
        file_bytes: size of the file.

    Returns:
        The tensors by name, in the order of their places. They lie one after another and fill the file, so reading all
        of them takes no more memory than the file is large.

    Raises:
        CorruptCheckpoint: it is no header of a file of this size.
    """
    try:
        listed: dict[str, Any] = json.loads(header)
        listed.pop("__metadata__", None)
        begin = _LENGTH.size + len(header)
        entries = [_entry(name, value, begin) for name, value in listed.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptCheckpoint(f"the header cannot be read: {type(error).__name__}: {error}") from error
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    end = begin
    for entry in entries:
        if entry.start != end:
            raise CorruptCheckpoint(f"{entry.name} begins at byte {entry.start}, not {end}")
        end = entry.stop
    if end != file_bytes:
        raise CorruptCheckpoint(f"the tensors end at byte {end} of {file_bytes}")
    return {entry.name: entry for entry in entries}


def _entry(name: str, value: Mapping[str, Any], begin: int) -> TensorEntry:
    dtype = DTYPES[value["dtype"]]
    shape, (start, stop) = value["shape"], value["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has a number that is no size")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start} bytes, which is not its shape's size")
    return TensorEntry(name, dtype, tuple(shape), begin + start, begin + stop)
