"""Registers the launcher with Hydra.

Hydra takes plugins from the namespace package `hydra_plugins` only. Its folder lies inside of this package, and is put
on the path here. So it works the same from a checkout, an editable install and a wheel.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from hydra.core.plugins import Plugins

FOLDER = Path(__file__).resolve().parent / "plugin"


def register() -> None:
    """Make `hydra/launcher=elastic` known in this process."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    plugins = Plugins.instance()  # imports every plugin anew, so the class is looked up afterwards
    plugins.register(importlib.import_module("hydra_plugins.elastic_launcher").ElasticLauncher)
