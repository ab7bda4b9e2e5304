"""Put on PYTHONPATH by a chaos run: every process of the run sees the storage faults of one control file.

The file has to be there when a process imports the storage. Processes that do not import it only look at one
environment variable.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = "elastic_moe.checkpoint.storage"


class _Finder(MetaPathFinder):
    """Finds the storage's module once, and installs the faults when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            control = Path(os.environ["CHAOS_STORAGE"])
            if control.exists():
                from tests.storage_faults import install

                install(control, float(os.environ["CHAOS_STORAGE_TIMEOUT_S"]))

        loader.exec_module = execute_and_install
        return spec


if "CHAOS_STORAGE" in os.environ:
    sys.meta_path.insert(0, _Finder())
