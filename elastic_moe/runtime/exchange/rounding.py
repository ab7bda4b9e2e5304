"""Stochastic rounding of gradients to bf16, for `reduce_precision=bf16`.

A number goes to one of its two neighbours in bf16, the more often to the one the nearer it is. So the mean is the
number itself, and the errors of many ranks and steps cancel, where rounding to the nearest loses what is small beside
the sum it belongs to. Source: Gupta et al., Deep Learning with Limited Numerical Precision
(https://arxiv.org/abs/1502.02551), section 3.

The random bits are a hash of the seed, the step, the rank and the element's place, so a run that is made again is made
with the same bits. The hash of an element is the finalizer of MurmurHash3
(https://github.com/aappleby/smhasher, public domain).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.parallel.collectives.group import HOST
from elastic_moe.plan.compiled import compiled_for_vectors

Bits = NDArray[np.uint32]
SPREAD, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd factors: a prime near 2^32 / 1.618, and MurmurHash3's
LOW, KEPT, WORD = 0xFFFF, 0xFFFF0000, 0xFFFFFFFF
ALL_BUT_SIGN, INFINITE, QUIET = 0x7FFFFFFF, 0x7F800000, 0x00400000  # the last one is set in a NaN that bf16 keeps
SPAN = 1 << 22  # elements rounded at once; bounds the temporaries on a GPU


@dataclass(frozen=True)
class StochasticRounding:
    """Rounds what a rank sends in one bucket.

    Args:
        seed: of the run.
        rank: of the sender.
        bucket: number of the bucket.
    """

    seed: int
    rank: int
    bucket: int

    def pack(self, pieces: Sequence[torch.Tensor], sent: torch.Tensor, step: int) -> None:
        """Round fp32 pieces into one bf16 vector, one after another; they may lie on another device.

        Args:
            pieces: 1-D tensors, contiguous.
            sent: bf16 [n] that they fill.
            step: for which they are the gradients.
        """
        key = self._key("sent", step)
        for start, piece in _with_starts(pieces):
            room = sent[start : start + piece.numel()]
            if piece.device == sent.device == HOST:
                _round_to(_bits(piece), room.view(torch.int16).numpy().view(np.uint16), np.uint32(key), start)
            else:
                room.copy_(rounded(piece, key, start))

    def round_sums(self, pieces: Sequence[torch.Tensor], step: int) -> None:
        """Round fp32 pieces in place, to numbers that bf16 has. Arguments as in `pack`."""
        key = self._key("sums", step)
        for start, piece in _with_starts(pieces):
            if piece.device == HOST:
                _round_in_place(_bits(piece), np.uint32(key), start)
            else:
                piece.copy_(rounded(piece, key, start))

    def _key(self, use: str, step: int) -> int:
        name = f"{use} {self.seed} {step} {self.rank} {self.bucket}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")


def _with_starts(pieces: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The pieces in spans, each with the place of its first element among all."""
    start = 0
    for piece in pieces:
        for span in piece.split(SPAN):
            yield start, span
            start += span.numel()


def _bits(piece: torch.Tensor) -> Any:
    return piece.view(torch.int32).numpy().view(np.uint32)


@compiled_for_vectors
def _round(bits: np.uint32, place: int, key: np.uint32) -> np.uint32:
    """The bits of an fp32 number, rounded to those that bf16 has. What is not finite stays so."""
    x = np.uint32(place * SPREAD) ^ key  # a product of numbers of 32 bits has 64 of them here
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(FIRST))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(SECOND))
    x ^= x >> np.uint32(16)
    is_nan = bits & np.uint32(ALL_BUT_SIGN) > np.uint32(INFINITE)
    raised = bits | np.uint32(QUIET) if is_nan else np.uint32(bits + (x & np.uint32(LOW)))
    return raised & np.uint32(KEPT)


@compiled_for_vectors
def _round_to(bits: Bits, out: NDArray[np.uint16], key: np.uint32, start: int) -> None:
    """Round the bits of fp32 numbers to those of bf16 ones. `start`: place of the first one."""
    for i in range(len(bits)):
        out[i] = np.uint16(_round(bits[i], start + i, key) >> np.uint32(16))


@compiled_for_vectors
def _round_in_place(bits: Bits, key: np.uint32, start: int) -> None:
    """As `_round_to`, and fp32 as before."""
    for i in range(len(bits)):
        bits[i] = _round(bits[i], start + i, key)


def rounded(piece: torch.Tensor, key: int, start: int) -> torch.Tensor:
    """What the loops make of an fp32 vector, in passes of torch on any device. `start`: place of its first element."""
    bits = piece.view(torch.int32).to(torch.int64) & WORD
    x = torch.arange(start, start + piece.numel(), device=piece.device) * SPREAD & WORD ^ key
    x = (x ^ (x >> 16)) * FIRST & WORD  # what is lost above 64 bits is above 32 bits
    x = (x ^ (x >> 13)) * SECOND & WORD
    x ^= x >> 16
    is_nan = (bits & ALL_BUT_SIGN) > INFINITE
    bits = torch.where(is_nan, bits | QUIET, bits + (x & LOW)) & KEPT
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


def warm_up() -> None:
    """Compile the loops, or load them from the cache."""
    rounding = StochasticRounding(0, 0, 0)
    rounding.pack([torch.ones(1)], torch.empty(1, dtype=torch.bfloat16), 0)
    rounding.round_sums([torch.ones(1)], 0)
