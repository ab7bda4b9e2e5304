"""The experts over a run, as maps with a row per expert and a column per stretch of steps: load, home and copies.

Homes are those of *workers*: a worker keeps its number when the membership gives it another rank. experts.jsonl is read
once; a later read takes only what was written since. When there are too many columns, two neighbours become one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.metrics.expert_history import COPY_CAME, HOME_CAME
from elastic_moe.metrics.jsonl import LineReader
from elastic_moe.metrics.records import translated_expert_record

MAX_COLUMNS = 160
MIN_COLUMNS = 24
MAX_CELLS = 400_000  # of all layers
NO_LOAD = 255  # code of a column without a record
LOAD_CODES_PER_OCTAVE = 40  # code = 40 log2(1 + load over the layer's mean)


@dataclass
class _Column:
    """Consecutive steps.

    Attributes:
        first, last: steps.
        tokens_LE: summed over the records of these steps; None if there is none.
        home_LE: index of the worker that has each expert's home at the end.
        copies_LE: number of copies at the end, the home's among them.
    """

    first: int
    last: int
    tokens_LE: np.ndarray | None
    home_LE: np.ndarray
    copies_LE: np.ndarray

    def absorb(self, later: _Column) -> None:
        """Take in the column after this one."""
        self.last, self.home_LE, self.copies_LE = later.last, later.home_LE, later.copies_LE
        if later.tokens_LE is not None:
            self.tokens_LE = later.tokens_LE if self.tokens_LE is None else self.tokens_LE + later.tokens_LE


class ExpertMaps:
    """Follows a growing experts.jsonl.

    Args:
        path: the file; it may be missing.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineReader(path)
        self._begin()

    def read(self) -> dict[str, Any] | None:
        """The maps so far, for the page; None as long as no placement is recorded."""
        records, anew = self._file.new_lines()
        if anew:
            self._begin()
        for record in records:
            self._take(translated_expert_record(record))
        return self._drawn() if self._columns else None

    def _begin(self) -> None:
        self._width, self._columns = 1, list[_Column]()
        self._workers: dict[str, int] = {}
        self._nodes: list[str] = []
        self._rank_to_worker = np.empty(0, dtype=int)
        self._home_LE = np.empty((0, 0), dtype=int)
        self._held_LER = np.empty((0, 0, 0), dtype=bool)
        self._moves_L = np.empty(0, dtype=int)

    def _take(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if record["event"] == "placement":
            self._place(record)
            tokens_LE = None
        elif record["event"] == "expert_load" and self._home_LE.size:
            tokens_LE = np.asarray(record["load"], dtype=float)
            if tokens_LE.shape != self._home_LE.shape:
                return
        else:
            return
        column = _Column(step, step, tokens_LE, self._home_LE.copy(), self._held_LER.sum(axis=2))
        self._add(column)
        layers, experts = self._home_LE.shape
        most = min(MAX_COLUMNS, max(MIN_COLUMNS, MAX_CELLS // max(layers * experts, 1)))
        while len(self._columns) > most:
            self._width *= 2
            columns, self._columns = self._columns, []
            for each in columns:
                self._add(each)

    def _add(self, column: _Column) -> None:
        """Add a column; one of the same stretch of steps takes it in. Steps before it were made again: they go."""
        while self._columns and self._columns[-1].last > column.last:
            self._columns.pop()
        if self._columns and self._columns[-1].first // self._width == column.first // self._width:
            self._columns[-1].absorb(column)
        else:
            self._columns.append(column)

    def _place(self, record: Mapping[str, Any]) -> None:
        """Carry out the moves of a placement; that of a new membership names all copies and homes."""
        if record.get("cause") == "membership" or not self._home_LE.size:
            layers, experts = record["shape"]
            ranks = record.get("ranks", [])
            for worker, node in ranks:
                if worker not in self._workers:
                    self._workers[worker] = len(self._workers)
                    self._nodes.append(node)
            self._rank_to_worker = np.array([self._workers[worker] for worker, _ in ranks], dtype=int)
            before_LE, self._home_LE = self._home_LE, np.zeros((layers, experts), dtype=int)
            self._held_LER = np.zeros((layers, experts, len(ranks)), dtype=bool)
            if before_LE.shape != (layers, experts):
                before_LE, self._moves_L = np.full((layers, experts), -1), np.zeros(layers, dtype=int)
        else:
            before_LE, self._home_LE = self._home_LE, self._home_LE.copy()
        for layer, expert, rank, kind in record["moves"]:
            if kind == HOME_CAME:
                self._home_LE[layer, expert] = self._rank_to_worker[rank]
            else:
                self._held_LER[layer, expert, rank] = kind == COPY_CAME
        self._moves_L += ((before_LE >= 0) & (before_LE != self._home_LE)).sum(axis=1)

    def _drawn(self) -> dict[str, Any]:
        """The maps as numbers that the page reads; see `assets/experts.js`."""
        loads = list[np.ndarray | None]()
        later: np.ndarray | None = None
        for column in reversed(self._columns):  # a record covers the steps before it
            later = column.tokens_LE if column.tokens_LE is not None else later
            loads.append(later)
        loads.reverse()
        layers, experts = self._home_LE.shape
        code_LEC = np.full((layers, experts, len(loads)), NO_LOAD, dtype=np.uint8)
        for number, tokens_LE in enumerate(loads):
            if tokens_LE is not None:
                share_LE = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
                codes = np.rint(LOAD_CODES_PER_OCTAVE * np.log2(1 + share_LE))
                code_LEC[:, :, number] = np.minimum(codes, NO_LOAD - 1)
        home_LEC = np.stack([column.home_LE for column in self._columns], axis=2)
        copies_LEC = np.stack([column.copies_LE for column in self._columns], axis=2)
        return {
            "steps": [column.last for column in self._columns],
            "layers": layers,
            "experts": experts,
            "workers": [[worker, node] for worker, node in zip(self._workers, self._nodes, strict=True)],
            "moved": self._moves_L.tolist(),
            "octave": LOAD_CODES_PER_OCTAVE,
            "load": [base64.b64encode(code_LEC[layer].tobytes()).decode() for layer in range(layers)],
            "home": [[_changes(row_C) for row_C in rows_EC] for rows_EC in home_LEC],
            "copies": [[_changes(row_C) for row_C in rows_EC] for rows_EC in copies_LEC],
        }


def _changes(values: np.ndarray) -> list[int]:
    """A row of a map, as [column, value, column, value, ...] for each column where the value changes."""
    at = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    return np.stack([at, values[at]], axis=1).ravel().tolist()
