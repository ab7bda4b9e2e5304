"""elastic_moe: an elastic trainer for Mixture-of-Experts language models on Ray.

    config = elastic_moe.configure({"model": "small", "run.dir": "runs/a", "data.corpus": "texts"})
    run = elastic_moe.train(config)
    run.metrics().plot(x="step", y="loss")

`configure` makes a checked configuration, `train` runs it, and `Run` reads what a run left behind. Importing the
package imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {  # __init__.pyi has the same for type checkers
    "Run": "api.run",
    "configure": "api.settings",
    "train": "api.training",
    "TrainingFailed": "api.training",
    "TrainConfig": "config.schema",
    "StorageFailed": "errors",
    "UserError": "errors",
}
__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'elastic_moe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"elastic_moe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
