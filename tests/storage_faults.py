"""A storage that fails as storage does: it errors, hangs, is slow or full, or says that files are absent.

It lies below `Storage`, as a file system of pyarrow over a local directory. A control file names the fault, so a test
changes it for all processes of a run at once.
"""

from __future__ import annotations

import errno
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from elastic_moe.checkpoint import storage as storage_module

FAULTS = ("error", "hang", "slow", "full", "absent")
READS = ("open_input_stream", "open_input_file", "get_file_info", "get_file_info_selector")
WRITES = ("open_output_stream", "move", "create_dir", "delete_file", "delete_dir")
POLL_S = 0.02
SLOW_S = 1.5  # of each call of a slow storage


class FaultyHandler(pafs.FSSpecHandler):
    """A local file system with the fault that stands in the control file: "" or one of FAULTS, then "read" or "write".

    A directory is made with the first file in it, as in an object store.
    """

    def __init__(self, control: Path) -> None:
        import fsspec

        super().__init__(fsspec.filesystem("file", auto_mkdir=True))
        self._control = control

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in READS + WRITES:
            return value

        def faulty(*arguments: Any, **options: Any) -> Any:
            self._fail("read" if name in READS else "write", name)
            return value(*arguments, **options)

        return faulty

    def _fail(self, kind: str, name: str) -> None:
        while (fault := fault_in(self._control)) == f"hang {kind}":
            time.sleep(POLL_S)
        if fault == f"slow {kind}":
            time.sleep(SLOW_S)
        if fault == f"error {kind}":
            raise OSError(errno.EIO, f"the storage fails at {name}")
        if fault == f"full {kind}":
            raise OSError(errno.ENOSPC, "No space left on device")
        if fault == f"absent {kind}":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def fault_in(control: Path) -> str:
    """The present fault."""
    return control.read_text() if control.exists() else ""


def set_fault(control: Path, fault: str) -> None:
    """Change the fault, for example to "hang write"; "" for none."""
    temporary = control.with_suffix(".new")
    temporary.write_text(fault)
    temporary.replace(control)


def install(control: Path, timeout_s: float = 60.0) -> None:
    """Let every checkpoint root of this process lie on a faulty storage."""
    filesystem = pafs.PyFileSystem(FaultyHandler(control))

    @lru_cache
    def open_faulty(root_uri: str) -> tuple[pafs.FileSystem, str]:
        return filesystem, Path(root_uri).absolute().as_posix()

    storage_module.open_filesystem = open_faulty  # type: ignore[assignment]
    storage_module.set_timeout(timeout_s)
