"""The temporary directory of an embedded or simulated cluster, and the removal of those that killed drivers left.

A driver that is killed with SIGKILL cannot remove its directory. The next start removes it, but only where that is
certain: a file in it names the process that made it, on this boot of this machine, and neither that process nor one of
its cluster lives. Everything else is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from elastic_moe.coordination.owner import Owner
from elastic_moe.environment import environment

PREFIX = "emoe"
MARKER = "owner.json"
TMPDIR = "RAY_TMPDIR"
PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def own_directory() -> Iterator[Path]:
    """Give Ray a temporary directory with a short path, and let its processes import this package.

    The path must be short because a socket's name has at most 107 bytes.
    """
    sweep()
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    (root / MARKER).write_text(json.dumps(asdict(Owner.here())))
    (root / "ray").mkdir()
    path = os.environ.get("PYTHONPATH")
    changed = {
        TMPDIR: str(root),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE.parent), path))),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    try:
        with environment(changed):
            yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def sweep() -> list[Path]:
    """Remove the directories of drivers that are dead, and whose clusters are. Returns them."""
    left = [root for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if _is_left(root)]
    for process in psutil.process_iter() if left else ():
        with suppress(psutil.Error):
            known = " ".join([*process.cmdline(), process.environ().get(TMPDIR, "")])
            left = [root for root in left if str(root) not in known]
    for root in left:
        shutil.rmtree(root, ignore_errors=True)
    return left


def _is_left(root: Path) -> bool:
    """Whether this is a directory of ours whose driver is known to be dead."""
    try:
        if root.is_symlink() or not root.is_dir() or root.stat().st_uid != os.getuid():
            return False
        return Owner(**json.loads((root / MARKER).read_text())).is_dead
    except (OSError, ValueError, TypeError):  # no marker, or none that can be read
        return False
