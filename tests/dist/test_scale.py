"""The benchmark of scale runs to its end with few workers; it is the only test of all control work at once."""

from __future__ import annotations

import pytest

from scripts.benchmarks.scale import benchmark

pytestmark = pytest.mark.timeout(240)


def test_the_benchmark_of_scale_runs_with_few_workers() -> None:
    result = benchmark([16, 24], 0.5)
    for row in result["coordinator"]:
        assert row["formed_s"] is not None
        assert row["published_to_all_s"] is not None, "a death was not answered"
        assert row["false_evictions"] == 0
    assert [row["ranks"] for row in result["planning_s"]] == [16, 24]
    assert all(value > 0 for rows in (result["planning_s"], result["step_s"]) for row in rows for value in row.values())
    assert set(result["growth_exponents"]) == {"planning_s", "in_nodes_s", "step_s", "coordinator"}
