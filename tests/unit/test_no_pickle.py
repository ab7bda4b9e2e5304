"""Nothing in the package loads pickles: from storage or a network, they run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "elastic_moe"
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("pandas", "read_pickle")}


def pickles_in(source: str) -> Iterator[str]:
    """Each use of pickles in a source file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield str(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if (node.module or "", a.name) in CALLS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in CALLS:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield "allow_pickle"
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            yield "weights_only"


def test_the_package_loads_no_pickle() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {use}" for path in PACKAGE.rglob("*.py") for use in pickles_in(path.read_text())
    ]
    assert not found


def test_the_scan_finds_them() -> None:
    for source in ("import pickle", "from cloudpickle import loads", "torch.load(f)", "np.load(f, allow_pickle=True)"):
        assert list(pickles_in(source)), source
    assert not list(pickles_in("import json\nnp.load(f, allow_pickle=False)"))
