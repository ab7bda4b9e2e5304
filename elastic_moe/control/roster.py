"""The living workers of a run and their nodes, counted, for the books of its time (`booking.py`). Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

LOADING, READY, MEMBER = "loading", "ready", "member"  # places of a worker


@dataclass(slots=True)
class Life:
    """A worker that lives. `place`: one of LOADING, READY and MEMBER."""

    node: str
    kind: str
    place: str = LOADING


@dataclass
class Roster:
    """The living workers, counted by place, and the nodes that they are on.

    Attributes:
        lives: by id.
        gone: workers that were removed without proof of their death, and since when; they may come back.
        counts: place -> workers.
        kinds: kind of node -> nodes with a worker.
    """

    lives: dict[str, Life] = field(default_factory=dict[str, Life])
    gone: dict[str, tuple[Life, float]] = field(default_factory=dict[str, tuple[Life, float]])
    counts: Counter[str] = field(default_factory=Counter[str])
    kinds: Counter[str] = field(default_factory=Counter[str])
    _on_node: Counter[str] = field(default_factory=Counter[str])

    def add(self, worker: str, life: Life) -> bool:
        """A worker is there. Returns whether it is the first one on its node."""
        self.lives[worker] = life
        self.counts[life.place] += 1
        self._on_node[life.node] += 1
        first = self._on_node[life.node] == 1
        self.kinds[life.kind] += first
        return first

    def move(self, worker: str, place: str) -> None:
        """A worker has another place."""
        life = self.lives[worker]
        self.counts[life.place] -= 1
        self.counts[place] += 1
        life.place = place

    def end(self, worker: str) -> Life | None:
        """A worker is there no more; None if it was not."""
        life = self.lives.pop(worker, None)
        if life is not None:
            self.counts[life.place] -= 1
            self._on_node[life.node] -= 1
            self.kinds[life.kind] -= self._on_node[life.node] == 0
        return life

    def set_away(self, worker: str, now_s: float) -> None:
        """A worker is not seen any more, and may come back."""
        if (life := self.end(worker)) is not None:
            self.gone[worker] = life, now_s
