"""Tokens that another trainer has made: indexed datasets of Megatron, and flat files of nanoGPT and llm.c.

Megatron: `NAME.bin` has the ids of all sequences, `NAME.idx` their type, lengths and places, and the documents
(https://github.com/NVIDIA/Megatron-LM, `megatron/core/datasets/indexed_dataset.py`). nanoGPT: `train.bin` and `val.bin`
are uint16 ids and nothing else (https://github.com/karpathy/nanoGPT, `data/openwebtext/prepare.py`). llm.c and
modded-nanogpt: the same after 256 int32, of which the first is a magic number and the third the number of ids.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic_moe.data.location import scheme_of
from elastic_moe.data.source_file import MEGATRON, SourceFile
from elastic_moe.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_LLM_C = {20240520: "<u2", 20240801: "<u4"}  # magic number -> type of the ids
_LLM_C_HEADER = 1024  # bytes


@dataclass(frozen=True, slots=True)
class Ids:
    """Consecutive ids of one document. `ends` is true if the document ends here."""

    ids: NDArray[np.integer]
    ends: bool


def is_megatron(path: Path) -> bool:
    """Whether a file is the data of an indexed dataset: its index lies beside it."""
    try:
        with path.with_suffix(".idx").open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def is_flat(path: Path) -> bool:
    """Whether a file may be a flat file of ids: ids below 2^16 with a zero in their bytes, or a known header."""
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return False
    known = len(head) >= 4 and struct.unpack("<i", head[:4])[0] in _LLM_C
    return known or (path.stat().st_size % 2 == 0 and b"\0" in head)


def parts_of(file: SourceFile, wanted_bytes: int) -> list[SourceFile]:
    """The file in parts of about so many bytes each.

    Raises:
        UserError: it holds no tokens that can be read.
    """
    if scheme_of(file.path):
        raise UserError(f"data.corpus: {file.path} holds tokens; copy it to this machine first.")
    if file.kind == MEGATRON:
        index = _Index(Path(file.path))
        ends = index.document_ends * index.ids.itemsize  # bytes after each document
        cuts = _cuts(ends, wanted_bytes)
        sizes = np.diff(ends[np.array(cuts[1:]) - 1], prepend=0) if len(cuts) > 1 else []
        spans = zip(cuts, cuts[1:], sizes, strict=False)
        return [replace(file, begin=a, count=b - a, weight=int(size)) for a, b, size in spans]
    ids = _flat(Path(file.path))
    step = max(wanted_bytes // ids.itemsize, 1)
    counts = [(begin, min(step, len(ids) - begin)) for begin in range(0, len(ids), step)]
    return [replace(file, begin=begin, count=n, weight=n * ids.itemsize) for begin, n in counts]


def read_ids(file: SourceFile, piece_bytes: int) -> Iterator[Ids]:
    """The ids of a part of a file, in pieces of a flat file or a long document.

    Raises:
        UserError: the file is damaged.
    """
    if file.kind != MEGATRON:
        ids = _flat(Path(file.path))
        end, step = file.begin + (file.count or len(ids)), max(piece_bytes // ids.itemsize, 1)
        for begin in range(file.begin, end, step):
            yield Ids(ids[begin : min(begin + step, end)], ends=False)
        return
    index = _Index(Path(file.path))
    step = max(piece_bytes // index.ids.itemsize, 1)
    for document in range(file.begin, file.begin + (file.count or len(index.document_ends))):
        begin, end = int(index.document_ends[document - 1]) if document else 0, int(index.document_ends[document])
        for first in range(begin, end, step):
            last = min(first + step, end)
            yield Ids(index.ids[first:last], ends=last == end)


def _cuts(ends: NDArray[np.int64], wanted_bytes: int) -> list[int]:
    """Indices of documents at which parts begin, and the number of documents."""
    cuts = [0]
    while cuts[-1] < len(ends):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(min(int(np.searchsorted(ends, before + wanted_bytes)) + 1, len(ends)))
    return cuts


class _Index:
    """An indexed dataset. Attributes: ids, memory-mapped; document_ends, int64 [documents], ids up to each end."""

    def __init__(self, path: Path) -> None:
        beside = path.with_suffix(".idx")
        try:
            with beside.open("rb") as stream:
                head = stream.read(len(_MAGIC) + 25)
                version, code, sequences, documents = struct.unpack("<QBQQ", head[len(_MAGIC) :])
                if version != 1 or code not in _TYPES or "f" in _TYPES[code]:
                    raise UserError(f"data.corpus: {beside} has version {version} or a type that is not known.")
                lengths = np.fromfile(stream, "<i4", sequences).astype(np.int64)
                stream.seek(8 * sequences, os.SEEK_CUR)  # places of the sequences, which follow from their lengths
                begins = np.fromfile(stream, "<i8", documents)
            self.ids: NDArray[np.integer] = np.memmap(path, dtype=_TYPES[code], mode="r")
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"data.corpus: cannot read {beside} and {path.name}: {error}") from error
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        whole = len(lengths) == sequences and len(begins) == documents and ends[-1] == len(self.ids)
        if not whole or (len(begins) and not 0 <= begins.min() <= begins.max() <= sequences):
            raise UserError(f"data.corpus: {beside} does not fit {path.name}; one of them is damaged.")
        self.document_ends = ends[begins[begins > 0]] if len(begins) else ends[1:]


def _flat(path: Path) -> NDArray[np.integer]:
    """The ids of a flat file, memory-mapped."""
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
        size = path.stat().st_size
        magic, _, count = struct.unpack("<iii", head) if len(head) == 12 else (0, 0, 0)
        if (kind := _LLM_C.get(magic)) is None:
            return np.memmap(path, dtype="<u2", mode="r", shape=(size // 2,))
        width = np.dtype(kind).itemsize
        if size != _LLM_C_HEADER + count * width:
            raise UserError(f"data.corpus: {path} is truncated: its header tells of {count} tokens.")
        return np.memmap(path, dtype=kind, mode="r", offset=_LLM_C_HEADER, shape=(count,))
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus: cannot read {path}: {error}") from error
