"""The steps of a run as columns of numbers, and their curves with few points.

metrics.jsonl is read in blocks of bytes, and a second read takes only what was written since. A long run is drawn with
`MAX_POINTS` points: each stands for as many consecutive steps, with the mean, the lowest and the highest value of each
key among them. So no spike is lost, however many steps there are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from elastic_moe.metrics.records import OLD_STEP_KEYS
from elastic_moe.metrics.schema import PHASES

MAX_POINTS = 1000  # of a curve
BLOCK_BYTES = 16 << 20
DIGITS = 6  # significant ones that the page has
CURVES = (
    *("loss", "lr", "grad_norm", "world_size", "balance", "cross_node_rows"),
    *("mtp_loss", "index_loss", "z_loss", "router_z_loss", "gain_forward", "gain_backward", "gain_backward_min"),
    *("step_s", *(f"{phase}_s" for phase in PHASES)),
)
_WHOLE = ("step", "tokens", "time")
_READ = (*_WHOLE, *CURVES, *OLD_STEP_KEYS)
_SCHEMA = pa.schema([(key, pa.float64()) for key in _READ])
Columns = dict[str, np.ndarray]


class StepColumns:
    """Reads a growing metrics.jsonl.

    Args:
        path: the file; it may be missing.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.bytes_read = 0
        self._forget()

    def read(self) -> Columns:
        """All steps so far: for each key an array with one number per step, NaN where a record lacks it.

        A file that was cut or replaced is read from its beginning.
        """
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(max(self._offset - len(self._last), 0))
                if file.read(len(self._last)) != self._last:
                    self._forget()
                file.seek(self._offset)
                for block in _blocks(file):
                    self._offset += len(block)
                    self.bytes_read += len(block)
                    self._last = block[block.rfind(b"\n", 0, -1) + 1 :]
                    self._chunks.append(_columns(block))
        if len(self._chunks) > 1:
            self._chunks = [{key: np.concatenate([chunk[key] for chunk in self._chunks]) for key in self._chunks[0]}]
        return self._chunks[0] if self._chunks else {key: np.empty(0) for key in (*_WHOLE, *CURVES)}

    def _forget(self) -> None:
        self._offset, self._last, self._chunks = 0, b"", list[Columns]()


def _blocks(file: io.BufferedReader) -> Iterator[bytes]:
    """Whole lines from here on, some megabytes at a time. A line without an end is left for later."""
    rest = b""
    while data := file.read(BLOCK_BYTES):
        whole, end, rest = (rest + data).rpartition(b"\n")
        if end:
            yield whole + end


def _columns(block: bytes) -> Columns:
    """Columns of some lines. Damaged lines, and lines without a step or a time, are left out."""
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(block_size=1 << 20),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )
        found = {key: table[key].to_numpy() for key in _READ}
    except pa.ArrowInvalid:  # one damaged line, or a value of another type
        values = [value for line in block.splitlines() if (value := _parsed(line)) is not None]
        found = {key: np.array([_number(value.get(key)) for value in values], dtype=float) for key in _READ}
    for old, new in OLD_STEP_KEYS.items():
        was = found.pop(old)
        found[new] = np.where(np.isnan(found[new]), was, found[new])
    found = {key: column.astype(np.float64 if key in _WHOLE else np.float32) for key, column in found.items()}
    good = ~(np.isnan(found["step"]) | np.isnan(found["time"]))
    return found if good.all() else {key: column[good] for key, column in found.items()}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def curves(columns: Columns, axes: Mapping[str, np.ndarray], most: int = MAX_POINTS) -> dict[str, Any]:
    """The curves of the page.

    Args:
        columns: of `StepColumns.read`.
        axes: further values of each step that only grow, such as its time. They become horizontal axes.
        most: points.

    Returns:
        `per`: steps per point; `x`: for each axis its value at the last step of each point; `y`: for each key that
        the run has `mean`, and with several steps per point `low` and `high`. Values that are missing are None.
    """
    count = len(columns["step"])
    points = min(count, most)
    if not points:
        return {"per": 1, "x": {}, "y": {}}
    edges = np.linspace(0, count, points + 1).astype(int)
    starts, ends = edges[:-1], edges[1:] - 1
    x = {"step": columns["step"][ends], **{name: values[ends] for name, values in axes.items()}}
    y: dict[str, dict[str, list[float | None]]] = {}
    for key in CURVES:
        column = columns[key]
        known = np.isfinite(column)
        if not known.any():
            continue
        counts = np.add.reduceat(known.astype(int), starts)
        sums = np.add.reduceat(np.where(known, column, 0.0), starts)
        y[key] = {"mean": rounded(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))}
        if points < count:
            low = np.minimum.reduceat(np.where(known, column, np.inf), starts)
            high = np.maximum.reduceat(np.where(known, column, -np.inf), starts)
            y[key] |= {"low": rounded(low), "high": rounded(high)}
    return {"per": round(count / points, 1), "x": {name: rounded(values, 9) for name, values in x.items()}, "y": y}


def rounded(values: Sequence[float] | np.ndarray, digits: int = DIGITS) -> list[float | None]:
    """Numbers for the page: few digits, and None for what is not finite."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in np.asarray(values).tolist()]
