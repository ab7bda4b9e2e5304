"""The house's borders: imports go only downward (elastic_moe/DESIGN.md section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "elastic_moe"
LEVEL = {
    "config": 0, "types": 0, "environment": 0, "errors": 0, "run_dir": 0, "run_log": 0, "sources": 0,
    "plan": 1, "control": 2, "model": 3, "parallel": 4, "optim": 4,
    "data": 4, "checkpoint": 4, "metrics": 4, "notices": 4, "coordination": 5, "runtime": 5, "saved": 5, "origin": 5,
    "actors": 6, "sweep": 7, "api": 8, "cli": 8, "__init__": 8,
}  # fmt: skip
ENTRY_POINTS = {
    "__main__.py",
    "train.py",
    "describe.py",
    "export.py",
    "generate.py",
    "report.py",
    "plan/explain.py",
    "plan/warm.py",
}
OUTSIDE = {  # third-party top-level packages -> parts that may import them
    "ray": {"actors", "sweep"},
    "hydra": {"cli", "sweep"},
    "numba": {"plan"},
    "omegaconf": {"api", "cli", "config", "origin", "saved", "sweep"},
    "wandb": {"metrics"},
    "accelerate": {"runtime", "metrics"},
    "torch": {"model", "saved", "cli", "parallel", "optim", "checkpoint", "runtime", "coordination", "actors", "data"},
}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if str(p.relative_to(PACKAGE)) not in ENTRY_POINTS]


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "elastic_moe" and rest:
            assert LEVEL[rest[0]] <= LEVEL[part], f"{path.name} ({part}) imports {name}"
        elif top in OUTSIDE:
            assert part in OUTSIDE[top], f"{path.name} ({part}) imports {top}"


def test_every_part_has_a_level() -> None:
    assert {part_of(path) for path in FILES} <= set(LEVEL)


def test_decisions_need_no_torch() -> None:
    """A process that imports all of `plan` and `control` has neither torch nor ray: it can simulate a whole cluster."""
    paths = [path.relative_to(PACKAGE) for path in FILES if part_of(path) in ("plan", "control")]
    modules = [".".join(("elastic_moe", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    assert {"elastic_moe.control.rebalance", "elastic_moe.plan.state.schedule"} <= set(modules)
    assert loaded(modules, "torch", "ray") == set()


def test_only_workers_have_torch() -> None:
    """A start imports this much in one process after another, and each import of torch takes seconds."""
    assert loaded(["elastic_moe.actors.driver", "elastic_moe.actors.coordinator"], "torch", "ray.train") == set()
    assert loaded(["elastic_moe.actors.fit"], "torch") == set()


def loaded(modules: list[str], *names: str) -> set[str]:
    """Those of the names that a process has after it has imported these modules."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return set(names) & set(result.stdout.split())
