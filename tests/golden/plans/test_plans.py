"""Committed plans: placement and token split of some small cases stay the same to the integer.

Ranks with different versions of the code must not meet in one run, but one version must plan alike on every machine
and after every refactoring. A change that is meant to alter plans writes the files anew: `python -m
tests.golden.plans.test_plans`. Loads and token counts are made from a seed with integer arithmetic alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe.plan.placement import Placement, Topology, plan_placement
from elastic_moe.plan.split import split_tokens, split_whole

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.json"))


def _loads(seed: int, layers: int, experts: int) -> np.ndarray:
    """Popularity of rank 1 / n in a random order, int64[layers, experts]."""
    rng = np.random.default_rng(seed)
    return np.stack([1_000_000 // (1 + rng.permutation(experts)) for _ in range(layers)])


def _plan(case: dict[str, Any]) -> dict[str, Any]:
    """The plan of a case: its placements one after the other, and the splits of the last one's first layer."""
    placement: Placement | None = None
    plans = []
    for stage in case["stages"]:
        if placement is not None:
            placement = placement.remap_ranks(stage["rank_of"])
        placement = plan_placement(
            _loads(stage["seed"], case["layers"], case["experts"]),
            Topology(tuple(stage["nodes"]), tuple(stage["speeds"])),
            stage["slots"],
            placement,
            stage["home_moves"],
        )
        plans.append({"expert_of_slot": placement.expert_of_slot.tolist(), "home": placement.home.tolist()})
    assert placement is not None
    stage = case["stages"][-1]
    rng = np.random.default_rng(stage["seed"])
    counts_RE = _loads(stage["seed"], 1, case["experts"])[0] // rng.integers(500, 2000, (len(stage["slots"]), 1))
    speeds = stage["speeds"]
    return {
        "plans": plans,
        "split": split_tokens(counts_RE, placement, 0, speeds).tolist(),
        "split_whole": split_whole(counts_RE, placement, 0, speeds).tolist(),
    }


def test_there_are_plans() -> None:
    assert len(FILES) >= 6


@pytest.mark.golden
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_plans_stay_the_same(path: Path) -> None:
    case = json.loads(path.read_text())
    assert _plan(case["case"]) == case["expected"]


def _write() -> None:
    for path in FILES:
        case = json.loads(path.read_text())["case"]
        path.write_text(json.dumps({"case": case, "expected": _plan(case)}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    _write()
