"""Batch of a step: the samples that make it up. `shares.py` says which of them each rank computes.

`sample_ids`, and `mixture_at` for several corpora, depend on the seed and the step alone, never on the world size. A
disturbed run therefore sees the same data as an undisturbed one, and the step is the only data state of a checkpoint.
Each epoch is a permutation from a Feistel network with cycle walking (Black & Rogaway 2002,
https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf), so a step costs O(batch), not O(samples). The round function is
the finaliser of splitmix64 (https://prng.di.unimi.it/splitmix64.c).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elastic_moe.config.data_rules import SHARE_BITS

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 0xFFFFFFFFFFFFFFFF
_CORPUS_SEED = 0x2545F4914F6CDD1D  # between the seeds of two corpora of a mixture


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64, elementwise; wraps modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(x: NDArray[np.uint64], key: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    """A bijection of [0, 4**half_bits) for every key."""
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    high, low = x >> half, x & mask
    for round_index in range(_ROUNDS):
        round_key = key + np.uint64((round_index + 1) * _GOLDEN & _MASK64)
        high, low = low, high ^ (_mix(_mix(low + round_key) ^ key) & mask)
    return (high << half) | low


def sample_ids(seed: int, step: int, global_batch: int, num_samples: int) -> NDArray[np.int64]:
    """Sample ids of one step, int64[global_batch].

    Steps take consecutive parts of an endless sequence of epochs. Within an epoch no sample repeats.

    Args:
        seed: the run's seed.
        step: 0, 1, 2, ...
        global_batch: sequences per step, the same in all of them.
        num_samples: sequences in the corpus.
    """
    return samples_at(seed, step * global_batch, global_batch, num_samples)


def samples_at(seed: int, start: int, count: int, num_samples: int) -> NDArray[np.int64]:
    """Sample ids of a part of the endless sequence of epochs, int64[count]; see `BatchSizes.start`.

    Args:
        seed: the run's seed.
        start: position of the first one.
        count: of samples.
        num_samples: sequences in the corpus.
    """
    assert start >= 0
    assert count >= 0
    return _shuffled(seed, np.arange(start, start + count, dtype=np.int64), num_samples)


def mixture_at(
    seed: int, start: int, count: int, num_samples: Sequence[int], weights: Sequence[float]
) -> NDArray[np.int64]:
    """Sample ids of a part of an endless sequence of several corpora, int64[count]; they are numbered through all.

    Every corpus has its own endless sequence of epochs. In each run of consecutive places, those of a corpus are as
    many as its share, give or take one for each corpus before it: place p is the first corpus's where p times its share
    passes a whole number, and the others share the places that are left in the same way (a chain of Beatty sequences).
    So a batch has the mixture's shares, and nothing but the place says which sample it takes.

    Args:
        seed: the run's seed.
        start: position of the first one.
        count: of samples.
        num_samples: sequences in each corpus.
        weights: of each corpus, above 0; shares are rounded to 2^-20.
    """
    assert start >= 0
    assert len(num_samples) == len(weights)
    place = np.arange(start, start + count, dtype=np.int64)
    assert not place.size or place[-1] < 1 << (62 - SHARE_BITS)
    ids, left = np.empty_like(place), np.arange(len(place))
    begin = 0
    for corpus, samples in enumerate(num_samples):
        share = weights[corpus] / sum(weights[corpus:])
        units = min(max(round(share * (1 << SHARE_BITS)), 1), 1 << SHARE_BITS)
        before = (place * units + (1 << SHARE_BITS - 1)) >> SHARE_BITS  # places of this corpus before each place
        own = ((place + 1) * units + (1 << SHARE_BITS - 1)) >> SHARE_BITS > before
        if corpus + 1 == len(num_samples):
            own, before = np.ones_like(own), place
        ids[left[own]] = begin + _shuffled(seed + corpus * _CORPUS_SEED, before[own], samples)
        left, place = left[~own], (place - before)[~own]
        begin += samples
    return ids


def _shuffled(seed: int, position: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    """The samples at some places of an endless sequence of epochs, each a permutation of its own."""
    assert num_samples > 0
    epoch, index = np.divmod(position, num_samples)
    base = np.uint64((seed * _GOLDEN + 1) & _MASK64)
    key = _mix(_mix(epoch.astype(np.uint64) + base) ^ base)
    half_bits = max(1, -(-(num_samples - 1).bit_length() // 2))
    x = _permute(index.astype(np.uint64), key, half_bits)
    outside = np.flatnonzero(x >= num_samples)
    while outside.size:  # cycle walking; the domain is less than four times too large, so few rounds suffice
        x[outside] = _permute(x[outside], key[outside], half_bits)
        outside = outside[x[outside] >= num_samples]
    return x.astype(np.int64)
