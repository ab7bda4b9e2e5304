"""What a run has sent to trackers: `tracking.json` in its directory, with an entry for each tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from elastic_moe.run_dir import TRACKING


class Mark(NamedTuple):
    """How far one tracker has come.

    Attributes:
        run_id: of the run there; "" before the first start.
        step: last step that was sent; 0 before the first.
        time: wall clock at which the newest step that was sent had been committed.
    """

    run_id: str = ""
    step: int = 0
    time: float = 0.0


def read_mark(run_dir: Path, name: str) -> Mark:
    """The mark of a tracker. A file that cannot be read counts as none: the tracker then begins anew."""
    found: Any = _read(run_dir).get(name)
    try:
        return Mark(str(found["run_id"]), int(found["step"]), float(found["time"]))
    except (KeyError, TypeError, ValueError):
        return Mark()


def write_mark(run_dir: Path, name: str, mark: Mark) -> None:
    """Keep the mark of a tracker. A full disk keeps the older one."""
    path = run_dir / TRACKING
    new = path.with_name(f".{path.name}.tmp")
    try:
        new.write_text(json.dumps({**_read(run_dir), name: mark._asdict()}) + "\n")
        new.replace(path)
    except OSError:
        return


def _read(run_dir: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((run_dir / TRACKING).read_text())
    except (OSError, ValueError):
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}
