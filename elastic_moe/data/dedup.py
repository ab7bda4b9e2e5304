"""Duplicate documents: exact ones by a hash, near ones by MinHash and locality-sensitive hashing.

Near: the words of a document in lower case, in shingles of 5; 112 minima in 14 bands of 8. Two documents that share a
part s of their shingles meet in a band with probability 1 - (1 - s^8)^14, which is one half at s = 0.69 and 0.92 at
0.8. MinHash: Broder 1997; bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4; the numbers
are those of FineWeb (Penedo et al. 2024, https://arxiv.org/abs/2406.17557, section 3.4). Documents that meet are one
cluster, of which the first in the order of the corpus stays. Nothing else is compared, as there.

A document is a row of a table, a line of JSONL, or a file of text (of a long one, each part).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from elastic_moe.data.encode import EncodeSettings, part_path
from elastic_moe.data.pieces import read_documents
from elastic_moe.data.source_file import Part

EXACT, NEAR = "exact", "near"
BANDS, ROWS = 14, 8
SHINGLE_WORDS = 5
MOST_CHARACTERS = 1 << 25  # of a document that are compared by near_prints
_CHUNK = 1 << 16
_SHINGLES = 4096  # whose hashes are computed at once
_SEED = 1997


def write_prints(part: Part, settings: EncodeSettings, told: Callable[[int], object]) -> None:
    """Write the fingerprints of a part's documents, uint64 [documents, bands], to the working directory.

    Raises:
        UserError: a file cannot be read, or has no text where it should.
        OSError: the directory cannot be written.
    """
    of = exact_print if settings.dedup == EXACT else near_prints
    prints: list[NDArray[np.uint64]] = []
    done = 0
    for document in read_documents(part.files, settings.text_field):
        own, size = of(document)
        prints.append(own)
        done += size
        told(done)
    table = np.stack(prints) if prints else np.zeros((0, 1 if settings.dedup == EXACT else BANDS), np.uint64)
    final = part_path(settings.directory, part.number, "prints")
    ours = final.with_name(f".{final.name}-{os.getpid()}")
    with ours.open("wb") as stream:
        np.save(stream, table)
    os.replace(ours, final)


def exact_print(document: TextIO) -> tuple[NDArray[np.uint64], int]:
    """A hash of a text, uint64 [1], and its size in bytes. Of 100 million texts two may meet once in 4,000 corpora."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    while chunk := document.read(_CHUNK):
        data = chunk.encode()
        digest.update(data)
        size += len(data)
    return np.frombuffer(digest.digest(), "<u8").astype(np.uint64), size


def near_prints(document: TextIO) -> tuple[NDArray[np.uint64], int]:
    """A hash of each band of a text, uint64 [BANDS], and its size in bytes."""
    data = document.read(MOST_CHARACTERS).lower().encode()
    words_W = np.array([zlib.crc32(word) for word in data.split()] or [0], np.uint64)
    width = min(SHINGLE_WORDS, len(words_W))
    shingles_S = np.zeros(len(words_W) - width + 1, np.uint64)
    for place in range(width):
        shingles_S = mixed(shingles_S + words_W[place : place + len(shingles_S)])
    factors_P, shifts_P = _permutations()
    minima_P = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for begin in range(0, len(shingles_S), _SHINGLES):
        hashes_PS = shingles_S[begin : begin + _SHINGLES] * factors_P[:, None] + shifts_P[:, None]
        np.minimum(minima_P, hashes_PS.min(axis=1), out=minima_P)
    bands_BR = minima_P.reshape(BANDS, ROWS)
    prints_B = np.arange(BANDS, dtype=np.uint64)
    for row in range(ROWS):
        prints_B = mixed(prints_B + bands_BR[:, row])
    return prints_B, len(data)


@lru_cache(maxsize=1)
def _permutations() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Odd factors and shifts, uint64 [BANDS * ROWS]: x -> a x + b modulo 2^64 permutes the hashes of shingles."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    factors_P, shifts_P = random.integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
    return factors_P | np.uint64(1), shifts_P


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64 (https://prng.di.unimi.it/splitmix64.c), elementwise; wraps modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_of_each(bands: Sequence[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Which documents stay, bool [documents].

    Documents with an equal hash in some band are connected; of each connected set the first stays. Each document takes
    the smallest number of those that it meets, again and again, until nothing changes.

    Args:
        bands: hashes of all documents, uint64 [documents], of each band.
    """
    label_D = np.arange(len(bands[0]))
    changed = len(label_D) > 0
    while changed:
        changed = False
        for hashes_D in bands:
            order_D = np.argsort(hashes_D, kind="stable")
            begins = np.flatnonzero(np.concatenate([[True], np.diff(hashes_D[order_D]) != 0]))
            smallest = np.minimum.reduceat(label_D[order_D], begins)
            new_D = np.empty_like(label_D)
            new_D[order_D] = np.repeat(smallest, np.diff(begins, append=len(label_D)))
            changed = changed or bool((new_D != label_D).any())
            label_D = new_D
        changed = changed and len(bands) > 1
    return label_D == np.arange(len(label_D))


def write_keep(directory: str | Path, numbers: Sequence[int]) -> int:
    """Decide which documents stay, from the fingerprints of all parts, and write that for each part.

    It takes some 50 bytes of memory a document for exact duplicates, and 150 for near ones.

    Returns:
        Number of documents that are dropped.
    """
    prints = [np.load(part_path(directory, number, "prints"), mmap_mode="r") for number in numbers]
    if not prints:
        return 0
    width = prints[0].shape[1]
    keep_D = first_of_each([np.concatenate([one[:, band] for one in prints]) for band in range(width)])
    begin = 0
    for number, one in zip(numbers, prints, strict=True):
        np.save(
            final := part_path(directory, number, "keep").with_suffix(".keep.npy"), keep_D[begin : begin + len(one)]
        )
        os.replace(final, part_path(directory, number, "keep"))
        begin += len(one)
    return int((~keep_D).sum())
