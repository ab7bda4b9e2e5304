"""What the workers' time went into, for the page: from goodput.jsonl, whose lines are sums from the start on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.metrics.jsonl import Tail
from elastic_moe.metrics.report.steps import rounded
from elastic_moe.run_dir import GOODPUT

MAX_POINTS = 200
Json = dict[str, Any]


class GoodputReader:
    """Follows a growing goodput.jsonl.

    Args:
        run_dir: the run directory; the file may be missing.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = Tail(run_dir / GOODPUT)

    def read(self) -> Json | None:
        """The books as they are now, and how they grew; None where there are none.

        Returns:
            `now`: the newest line. `time`, `worker_s`: wall clock and seconds by cause of some lines. `spent`: the
            cost, or the workers' hours where no price is known, at these times.
        """
        lines = self._file.lines()
        if not lines:
            return None
        chosen = np.unique(np.linspace(0, len(lines) - 1, min(MAX_POINTS, len(lines))).astype(int))
        some = [lines[index] for index in chosen]
        priced = all(line.get("cost") is not None for line in some)
        hours = [line.get("total_s", 0.0) / 3600 for line in some]
        causes = list(some[-1]["worker_s"])
        return {
            "now": lines[-1],
            "time": [line["time"] for line in some],
            "worker_s": {c: rounded([line["worker_s"].get(c, 0.0) for line in some]) for c in causes},
            "spent": {
                "time": [line["time"] for line in some],
                "cost": [line["cost"] for line in some] if priced else hours,
                "unit": "price" if priced else "worker hours",
            },
        }
