"""The picture of the imports in elastic_moe/DESIGN.md: `python -m scripts.imports [--write]`.

Packages of elastic_moe as boxes, one row per layer; an arrow says that a module of the one imports a module of the
other. Imports inside functions count. Arrows that follow from others (a -> b -> c implies a -> c) are left out, so that
the picture can be read.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "elastic_moe"
DESIGN = PACKAGE / "DESIGN.md"
BEGIN, END = "<!-- imports: python -m scripts.imports --write -->", "<!-- end of imports -->"
ENTRY_POINTS = {"elastic_moe.plan.explain", "elastic_moe.plan.warm"}  # for `python -m`; they only call a command
Graph = dict[str, set[str]]


def module_graph(package: Path) -> Graph:
    """Module -> modules of the same package that it imports, at the top or inside a function; type-checking imports
    too.
    """
    files = {".".join(p.relative_to(package.parent).with_suffix("").parts): p for p in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: Graph = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names if alias.name in modules)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    target = f"{node.module}.{alias.name}"
                    target = target if target in modules else node.module
                    if target in modules and target != name:
                        graph[name].add(target)
    return graph


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def folder_graph(graph: Graph) -> Graph:
    """The same by folder below elastic_moe, without types, errors and entry points, which say nothing about the
    structure.
    """
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()} | {"saved"}

    def folder(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in folders else None

    out: Graph = {}
    for module, targets in graph.items():
        if module not in ENTRY_POINTS and (source := folder(module)) is not None:
            out.setdefault(source, set()).update(t for m in targets if (t := folder(m)) is not None and t != source)
    return out


def reduce(graph: Graph) -> Graph:
    """The arrows that do not follow from others."""

    def reach(node: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(node, ()))
        while todo:
            if (target := todo.pop()) not in seen:
                seen.add(target)
                todo += graph.get(target, ())
        return seen

    return {
        node: {t for t in targets if not any(t in reach(other) for other in targets if other != t)}
        for node, targets in graph.items()
    }


def picture() -> str:
    """A Mermaid flowchart, which GitHub draws."""
    arrows = reduce(folder_graph(module_graph(PACKAGE)))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {source} --> {target}" for source in sorted(arrows) for target in sorted(arrows[source])]
    return "\n".join([BEGIN, *lines, "```", END])


def in_design() -> str:
    """The picture as it stands in DESIGN.md, or an empty text."""
    text = DESIGN.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)] if BEGIN in text and END in text else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.imports", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the picture into elastic_moe/DESIGN.md")
    if not parser.parse_args().write:
        print(picture())
        return 0
    old = in_design()
    if not old:
        print(f"{DESIGN} has no place for the picture: a line {BEGIN} and a line {END}.", file=sys.stderr)
        return 2
    DESIGN.write_text(DESIGN.read_text().replace(old, picture()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
