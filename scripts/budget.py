"""The size budget of the package, as a table: `python -m scripts.budget [--rev REV]`.

With `--rev` the table has a second column: the same counts for that revision. The limits hold for every module of
elastic_moe; functions that numba or Triton compile may be longer and take more parameters, since they can take no
objects.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.imports import cycles, module_graph

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "elastic_moe"
FILE_LINES, CLASS_LINES, CLASS_METHODS, FUNCTION_LINES, PARAMETERS, LINE_LENGTH = 350, 250, 15, 60, 8, 120
COMPILED = ("compiled", "triton.jit", "njit")  # decorators of compiled kernels
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Measure:
    """One thing that was measured: what it is, how large, and the limit."""

    kind: str
    size: int
    limit: int
    where: str

    @property
    def exceeds(self) -> bool:
        return self.size > self.limit


def _parameters(function: Function) -> int:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(a.arg not in ("self", "cls") for a in arguments)


def _lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def measures(root: Path) -> Iterator[Measure]:
    """Everything under root/elastic_moe that the budget limits."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        where, source = str(path.relative_to(root)), path.read_text()
        lines = source.splitlines()
        yield Measure("lines of a file", len(lines), FILE_LINES, where)
        for number, line in enumerate(lines, 1):
            yield Measure("characters of a line", len(line), LINE_LENGTH, f"{where}:{number}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(member, Function) for member in node.body)
                yield Measure("lines of a class", _lines(node), CLASS_LINES, f"{where}:{node.lineno} {node.name}")
                yield Measure("methods of a class", methods, CLASS_METHODS, f"{where}:{node.lineno} {node.name}")
            elif isinstance(node, Function):
                if any(name in ast.unparse(decorator) for decorator in node.decorator_list for name in COMPILED):
                    continue
                at = f"{where}:{node.lineno} {node.name}"
                yield Measure("lines of a function", _lines(node), FUNCTION_LINES, at)
                yield Measure("parameters of a function", _parameters(node), PARAMETERS, at)
    for cycle in cycles(module_graph(root / PACKAGE)):
        yield Measure("import cycles", 1, 0, " -> ".join(cycle))


def table(found: list[Measure]) -> dict[str, tuple[int, int, int, str]]:
    """kind -> (limit, largest, number over the limit, where the largest is)."""
    rows: dict[str, tuple[int, int, int, str]] = {"import cycles": (0, 0, 0, "")}
    for kind in sorted({m.kind for m in found}):
        of_kind = [m for m in found if m.kind == kind]
        worst = max(of_kind, key=lambda m: m.size)
        rows[kind] = (worst.limit, worst.size, sum(m.exceeds for m in of_kind), worst.where)
    return rows


def at_revision(revision: str) -> list[Measure]:
    """The measures of a revision of this repository."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision, PACKAGE], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return list(measures(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.budget", description=__doc__.split("\n")[0])
    parser.add_argument("--rev", help="a revision to stand beside the tree as it is")
    options = parser.parse_args()
    now = table(list(measures(ROOT)))
    before = table(at_revision(options.rev)) if options.rev else {}
    head = f"{'':26}{'limit':>6}{'largest':>9}{'over':>6}" + (
        f"{'largest at ' + options.rev[:12]:>24}{'over':>6}" if before else ""
    )
    print(head)
    for kind, (limit, largest, over, where) in now.items():
        then = before.get(kind)
        beside = f"{then[1]:>24}{then[2]:>6}" if then else ""
        print(f"{kind:26}{limit:>6}{largest:>9}{over:>6}{beside}   {where}")


if __name__ == "__main__":
    main()
