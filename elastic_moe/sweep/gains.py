"""Whether more workers make a trial faster, as its own steps tell. Pure.

A small model may train no faster on four workers than on one, and on shared processors slower. Trials of a sweep mostly
have one shape, so what was measured on one trial holds for all of its kind. More workers are given to trials whose
speed is known with those that they have. When they have trained with more for a while, the two speeds are compared.
Where the workers that came last bring too little, all trials of the kind go back, and a number in between is tried, if
there is one that is far enough from both.

Trials may share processors. So a speed counts if the pool has not changed since, and nobody is given more before every
trial that trains is measured.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

STEPS, SECONDS = 5, 5.0  # of training with the same workers, until its speed is known
FIRST_STEPS = 2  # after a change, which are slower
PATIENCE_S = 60.0  # in a pool that changes all the time, speeds count after so long
CLEAR = 1.5  # numbers of workers are compared if one is at least so many times the other


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a trial that has a process.

    Attributes:
        trial: its number.
        kind: of all trials that compute alike: the same model, data, optimizer and precision.
        allowed: workers that it may have.
        workers: workers that train; 0 before the first step.
        step: last committed step.
        tokens_per_s: in that step; None before the first.
    """

    trial: int
    kind: str
    allowed: int
    workers: int = 0
    step: int = 0
    tokens_per_s: float | None = None


@dataclass
class _Meter:
    """The speed of one trial since its number of workers changed.

    Attributes:
        workers: that train.
        since_s: time of the change.
        known_s: time at which its speed was last known in a pool that does not change; that of the change before.
        step: the last one that was seen.
        seen: (time, tokens/s) of single steps.
        first: steps that are still to be left out.
    """

    workers: int
    since_s: float
    known_s: float
    step: int
    seen: deque[tuple[float, float]] = field(default_factory=lambda: deque[tuple[float, float]](maxlen=200))
    first: int = FIRST_STEPS

    def take(self, look: Look, now_s: float) -> None:
        if look.tokens_per_s is None or look.step <= self.step:
            return
        self.step = look.step
        if self.first:
            self.first -= 1
        else:
            self.seen.append((now_s, look.tokens_per_s))

    def speed(self, steady_s: float, now_s: float) -> float | None:
        """Tokens/s, in the middle; None while it is not known. `steady_s`: since when the pool has not changed."""
        steady = self._since(max(self.since_s, steady_s), now_s)
        if steady is not None:
            self.known_s = now_s
        return self._since(self.since_s, now_s) if now_s - self.known_s >= PATIENCE_S else steady

    def _since(self, since_s: float, now_s: float) -> float | None:
        found = [rate for at_s, rate in self.seen if at_s >= since_s]
        return median(found) if len(found) >= STEPS and now_s - since_s >= SECONDS else None


class Gains:
    """What a sweep knows of the speed of its trials.

    Args:
        least: the share of a speed-up in proportion that more workers have to bring; 0: no trial is measured.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._pool: frozenset[tuple[int, int]] = frozenset()
        self._steady_s = 0.0
        self._meters: dict[int, _Meter] = {}
        self._known: set[int] = set()  # trials whose speed with their present workers is known
        self._every_known_s = 0.0
        self._may_grow = False
        self._speeds: dict[str, dict[int, float]] = {}  # kind -> workers -> tokens/s
        self._limits: dict[str, tuple[int, int]] = {}  # kind -> workers that pay, and more that bring too little

    def look(self, looks: Sequence[Look], now_s: float) -> list[str]:
        """Take in what is seen of all trials that have a process. Returns lines to be told."""
        if not self._least:
            return []
        pool = frozenset((look.trial, look.workers) for look in looks)
        if pool != self._pool:
            self._pool, self._steady_s = pool, now_s
        self._meters = {look.trial: self._meter(look, now_s) for look in looks}
        self._known, told = set(), list[str]()
        for look in looks:
            meter = self._meters[look.trial]
            meter.take(look, now_s)
            speed = meter.speed(self._steady_s, now_s)
            if speed is not None and look.workers == look.allowed:
                self._known.add(look.trial)
                told += self._learn(look, speed)
        every = len(self._known) == len(looks)
        self._every_known_s = now_s if every else self._every_known_s
        self._may_grow = every or now_s - self._every_known_s >= PATIENCE_S
        return told

    def most(self, look: Look, most: int) -> int:
        """Workers that a trial may be given at most. `most`: those that it could use. A trial that waits has none."""
        if not self._least:
            return most
        most = min(most, self._limit(look.kind, most))
        grows = not look.allowed or (self._may_grow and look.trial in self._known)
        return most if grows else min(most, look.allowed)

    def _meter(self, look: Look, now_s: float) -> _Meter:
        known = self._meters.get(look.trial)
        if known is not None and known.workers == look.workers:
            return known
        return _Meter(look.workers, now_s, now_s, look.step)

    def _learn(self, look: Look, speed: float) -> list[str]:
        """Note a speed, and compare it with that of fewer workers."""
        speeds = self._speeds.setdefault(look.kind, {})
        speeds[look.workers] = speed
        fewer = [workers for workers in speeds if workers * CLEAR <= look.workers]
        pays, too_many = self._limits.get(look.kind, (0, look.workers + 1))
        if not fewer or look.workers >= too_many:
            return []
        base = max(fewer)
        if speed >= speeds[base] * (1 + self._least * (look.workers / base - 1)):
            if look.kind in self._limits:
                self._limits[look.kind] = max(pays, look.workers), too_many
            return []
        self._limits[look.kind] = base, look.workers
        times, limit = speed / speeds[base], self._limit(look.kind, base)
        return [
            f"trial {look.trial}: {look.workers} workers train {times:.2f} times as fast as {base}, so trials like it "
            f"have {limit} at most (sweep.min_gain={self._least:g})"
        ]

    def _limit(self, kind: str, unknown: int) -> int:
        """Most workers of such a trial: those that pay, or more that may. `unknown`: where nothing was too much yet."""
        if kind not in self._limits:
            return unknown
        pays, too_many = self._limits[kind]
        between = math.isqrt(pays * too_many)
        return between if between >= CLEAR * pays else pays
