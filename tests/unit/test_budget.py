"""The size budget of the package, and the tools that measure it. A failure names the worst offenders."""

from __future__ import annotations

from pathlib import Path

from scripts.budget import LINE_LENGTH, ROOT, measures, table
from scripts.imports import cycles, in_design, module_graph, picture


def test_no_module_exceeds_the_budget() -> None:
    over = sorted((m for m in measures(ROOT) if m.exceeds), key=lambda m: m.size / max(m.limit, 1), reverse=True)
    worst = "\n".join(f"{m.kind}: {m.size}, at most {m.limit}: {m.where}" for m in over[:20])
    assert not over, f"{len(over)} places exceed the budget; the worst are:\n{worst}"


def test_what_exceeds_the_budget_is_found(tmp_path: Path) -> None:
    package = tmp_path / "elastic_moe"
    package.mkdir()
    arguments = ", ".join(f"a{i}" for i in range(9))
    methods = "".join(f"    def m{i}(self): pass\n" for i in range(16))
    body = "".join("    pass\n" for _ in range(60))
    (package / "one.py").write_text(f"import elastic_moe.two\nclass C:\n{methods}def f({arguments}):\n{body}")
    (package / "two.py").write_text("def g():\n    from elastic_moe import one  #" + "x" * LINE_LENGTH + "\n" * 351)
    over = {kind for kind, (_, _, number, _) in table(list(measures(tmp_path))).items() if number}
    assert over == {
        "methods of a class", "parameters of a function", "lines of a function", "characters of a line",
        "lines of a file", "import cycles",
    }  # fmt: skip


def test_compiled_kernels_may_be_longer(tmp_path: Path) -> None:
    package = tmp_path / "elastic_moe"
    package.mkdir()
    (package / "one.py").write_text("@compiled\ndef f():\n" + "    pass\n" * 61)
    assert not [m for m in measures(tmp_path) if m.exceeds]


def test_a_cycle_within_functions_counts_too() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_picture_in_the_design_is_that_of_the_imports() -> None:
    assert in_design() == picture(), "elastic_moe/DESIGN.md is out of date: python -m scripts.imports --write"


def test_entry_points_are_part_of_the_graph() -> None:
    graph = module_graph(ROOT / "elastic_moe")
    assert "elastic_moe.cli.explain" in graph["elastic_moe.plan.explain"]
