"""Tokens that another trainer has made: indexed datasets of Megatron, and flat files of nanoGPT and llm.c.

Megatron: `NAME.bin` has the ids of all sequences, `NAME.idx` their type, lengths and places, and the documents
(https://github.com/NVIDIA/Megatron-LM, `megatron/core/datasets/indexed_dataset.py`). nanoGPT: `train.bin` and `val.bin`
are uint16 ids and nothing else (https://github.com/karpathy/nanoGPT, `data/openwebtext/prepare.py`), or uint32 where
users have larger vocabularies. llm.c and modded-nanogpt: the same after 256 int32, of which the first is a magic number
and the third the number of ids.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from elastic_moe.data.location import scheme_of
from elastic_moe.data.source_file import MEGATRON, TOKENS, SourceFile
from elastic_moe.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_LLM_C = {20240520: "<u2", 20240801: "<u4"}  # magic number -> type of the ids
_LLM_C_HEADER = 1024  # bytes
_HEAD = 1 << 16  # bytes by which a flat file is told
_FEW, _HIGH, _LARGE = 32, 32, 4096  # ids that tell nothing; upper halves of a vocabulary of 2^21; ids of 12 bits


@dataclass(frozen=True, slots=True)
class Ids:
    """Consecutive ids of one document. `ends` is true if the document ends here."""

    ids: NDArray[np.integer]
    ends: bool


def kind_of(path: Path, alone: bool) -> tuple[str, str] | None:
    """How a `.bin` file is read, and the type of its ids; None if it holds no tokens.

    Args:
        path: of the file.
        alone: among its neighbours is none with text, so that without an index it may be flat.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    index = path.with_suffix(".idx")
    try:
        if index.exists():
            with index.open("rb") as stream:
                if stream.read(len(_MAGIC)) == _MAGIC:
                    return MEGATRON, ""
            if alone:
                raise UserError(f"data.corpus: {index} is no index of Megatron's; without it {path.name} can be flat.")
            return None
        if not alone:
            return None
        with path.open("rb") as stream:
            head, size = stream.read(_HEAD), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(f"data.corpus: cannot read {path}: {error.strerror}") from error
    if len(head) >= 4 and struct.unpack("<i", head[:4])[0] in _LLM_C:
        return TOKENS, ""
    if b"\0" not in head:
        return None
    if len(head) >= _LLM_C_HEADER and any(head[:12]) and not any(head[12:_LLM_C_HEADER]):
        raise UserError(f"data.corpus: {path} begins with a header that is not known, so its ids are not either.")
    if size % 2:
        raise UserError(f"data.corpus: {path} has an odd number of bytes, so it holds no whole ids of 16 bits.")
    return TOKENS, "<u4" if _has_wide_ids(head, size) else "<u2"


def _has_wide_ids(head: bytes, size: int) -> bool:
    """Whether a flat file has ids of 32 bits: every second half of them is 0, or next to it beside large ones."""
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    low, high = halves[::2], halves[1::2]
    if size % 4 or len(low) < _FEW:
        return False
    return bool((high.max() == 0 and low.max() > 0) or (high.max() < _HIGH and low.max() > _LARGE))


def is_index(path: Path) -> bool:
    """Whether a file is the index of tokens beside it."""
    return path.suffix.lower() == ".idx" and path.with_suffix(".bin").exists()


def parts_of(file: SourceFile, wanted_bytes: int) -> list[SourceFile]:
    """The file in parts of about so many bytes each.

    Raises:
        UserError: it holds no tokens that can be read.
    """
    if scheme_of(file.path):
        raise UserError(f"data.corpus: {file.path} holds tokens; copy it to this machine first.")
    if file.kind == MEGATRON:
        index = _Index(Path(file.path))
        ends = index.document_ends * index.type.itemsize  # bytes after each document
        cuts = _cuts(ends, wanted_bytes)
        sizes = np.diff(ends[np.array(cuts[1:]) - 1], prepend=0) if len(cuts) > 1 else []
        spans = zip(cuts, cuts[1:], sizes, strict=False)
        return [replace(file, begin=a, count=b - a, weight=int(size)) for a, b, size in spans]
    kind, _, ids = _flat(file)
    step = max(wanted_bytes // kind.itemsize, 1)
    counts = [(begin, min(step, ids - begin)) for begin in range(0, ids, step)]
    return [replace(file, begin=begin, count=n, weight=n * kind.itemsize) for begin, n in counts]


def read_ids(file: SourceFile, piece_bytes: int) -> Iterator[Ids]:
    """The ids of a part of a file, in pieces of a flat file or a long document.

    Nothing is memory-mapped: a file that becomes shorter meanwhile would end this process.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be read.
    """
    if file.kind != MEGATRON:
        kind, first, ids = _flat(file)
        end = file.begin + (file.count or ids)
        with open(file.path, "rb") as stream:
            stream.seek(first + file.begin * kind.itemsize)
            for _, own in _pieces(stream, kind, end - file.begin, piece_bytes):
                yield Ids(own, ends=False)
        return
    index = _Index(Path(file.path))
    ends = index.document_ends[file.begin : file.begin + file.count if file.count else None]
    at = int(index.document_ends[file.begin - 1]) if file.begin else 0
    with open(file.path, "rb") as stream:
        stream.seek(at * index.type.itemsize)
        for end in map(int, ends):
            for left, own in _pieces(stream, index.type, end - at, piece_bytes):
                yield Ids(own, ends=not left)
            at = end


def _pieces(stream: BinaryIO, kind: np.dtype, left: int, size: int) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """The next so many ids in pieces of `size` bytes, each with the number of those that are left after it."""
    step = max(size // kind.itemsize, 1)
    while left:
        ids = np.fromfile(stream, kind, min(step, left))
        if len(ids) < min(step, left):
            raise OSError("it ends too early")
        left -= len(ids)
        yield left, ids


def _cuts(ends: NDArray[np.int64], wanted_bytes: int) -> list[int]:
    """Indices of documents at which parts begin, and the number of documents."""
    cuts = [0]
    while cuts[-1] < len(ends):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(min(int(np.searchsorted(ends, before + wanted_bytes)) + 1, len(ends)))
    return cuts


class _Index:
    """An indexed dataset. Attributes: type, of its ids; document_ends, int64 [documents], ids up to each end."""

    def __init__(self, path: Path) -> None:
        beside = path.with_suffix(".idx")
        damaged = UserError(f"data.corpus: {beside} does not fit {path.name}; one of them is damaged.")
        try:
            with beside.open("rb") as stream:
                head = stream.read(len(_MAGIC) + 25)
                version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MAGIC) :])
                known = version == 1 and code in _TYPES and "f" not in _TYPES[code]
                if known and len(head) + 12 * sequences + 8 * documents > os.fstat(stream.fileno()).st_size:
                    raise damaged
                lengths = np.fromfile(stream, "<i4", sequences if known else 0).astype(np.int64)
                stream.seek(8 * len(lengths), os.SEEK_CUR)  # places of the sequences, which follow from their lengths
                begins = np.fromfile(stream, "<i8", documents if known else 0)
            size = path.stat().st_size
        except UserError:
            raise
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"data.corpus: cannot read {beside} and {path.name}: {error}") from error
        if not known:
            raise UserError(f"data.corpus: {beside} has version {version} or a type that is not known.")
        self.type = np.dtype(_TYPES[code])
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        if ends[-1] * self.type.itemsize != size or (lengths < 0).any():
            raise damaged
        if len(begins) and (begins[0] != 0 or begins[-1] != sequences or (np.diff(begins) < 0).any()):
            raise UserError(f"data.corpus: the documents in {beside} are not all sequences of {path.name}, in order.")
        self.document_ends = ends[begins[1:]] if len(begins) else ends[1:]


def _flat(file: SourceFile) -> tuple[np.dtype, int, int]:
    """The type of a flat file's ids, the byte of the first one, and their number."""
    path = Path(file.path)
    try:
        with path.open("rb") as stream:
            head, size = stream.read(12), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(f"data.corpus: cannot read {path}: {error.strerror}") from error
    magic, _, count = struct.unpack("<iii", head) if len(head) == 12 else (0, 0, 0)
    if (name := _LLM_C.get(magic)) is None:
        kind = np.dtype(file.encoding)
        return kind, 0, size // kind.itemsize
    kind = np.dtype(name)
    if size != _LLM_C_HEADER + count * kind.itemsize:
        raise UserError(
            f"data.corpus: {path} is damaged: by its header it has {count} tokens, and by its size "
            f"{max(size - _LLM_C_HEADER, 0) / kind.itemsize:g}."
        )
    return kind, _LLM_C_HEADER, count
