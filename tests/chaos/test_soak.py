"""The soak: schedules are drawn from the seed alone, and its checks find what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from elastic_moe.metrics.schema import EVENT_KINDS
from scripts.benchmarks.chaos_faults import FATAL, WEIGHTS, schedule
from scripts.benchmarks.chaos_recipes import GROUPS, INEXACT, draw_recipe
from scripts.benchmarks.chaos_run import avoidable_losses, wrong_checkpoint, wrong_losses, wrong_records

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120


def test_a_seed_gives_one_schedule_and_seeds_differ() -> None:
    assert schedule(7, STEPS) == schedule(7, STEPS)
    assert len({str(schedule(seed, STEPS)) for seed in range(50)}) == 50


def test_faults_are_within_the_run_and_one_of_them_at_most_ends_it() -> None:
    for seed in range(300):
        faults = schedule(seed, STEPS)
        steps = [fault["step"] for fault in faults]
        assert steps == sorted(steps)
        assert steps[0] >= 2
        assert steps[-1] < STEPS
        assert sum(fault["kind"] in FATAL for fault in faults) <= 1


def test_every_kind_is_drawn_and_none_that_is_left_out() -> None:
    drawn = {fault["kind"] for seed in range(100) for fault in schedule(seed, STEPS)}
    assert drawn == set(WEIGHTS)
    without = tuple(kind for kind in WEIGHTS if not kind.startswith("reset"))
    assert {fault["kind"] for seed in range(100) for fault in schedule(seed, STEPS, without)} == set(without)


def test_recipes_can_be_trained_and_every_setting_is_drawn(tmp_path: Path) -> None:
    """The command's own checks see them, in a process of their own: Hydra's settings are those of a whole process."""
    place = f"Path({str(tmp_path)!r})"
    program = (
        "from pathlib import Path; from elastic_moe.cli.compose import check, register_schema\n"
        "from scripts.benchmarks.chaos_recipes import draw_recipe; from scripts.benchmarks.chaos_run import overrides\n"
        "register_schema()\n"
        "for recipe in map(draw_recipe, range(80)):\n"
        f"    (config,) = check(overrides({place} / 'run', {place}, {STEPS}, 1, recipe.words))\n"
        "    assert config.elastic.reproducible == recipe.exact\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = [draw_recipe(seed) for seed in range(80)]
    assert drawn[7] == draw_recipe(7)
    words = {word for group in (*GROUPS, *INEXACT) for choice in group for word in choice.split()}
    assert words == {word for recipe in drawn for word in recipe.words}


def test_a_missing_a_repeated_and_a_late_step_are_found(tmp_path: Path) -> None:
    def complaints(steps: list[int]) -> list[str]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        return wrong_records(tmp_path, 4)

    assert not complaints([1, 2, 3, 4])
    for steps in ([1, 2, 4], [1, 2, 2, 3, 4], [1, 2, 3], [1, 3, 2, 4], []):
        assert complaints(steps), steps


def test_losses_that_differ_in_the_last_bit_are_found() -> None:
    assert not wrong_losses([1.0, 2.0], [1.0, 2.0])
    assert wrong_losses([1.0, 2.0000000000000004], [1.0, 2.0]) == [
        "the losses differ from the undisturbed run's from step 2 on"
    ]
    assert wrong_losses([1.0], [1.0, 2.0])
    for far, complaints in ((1.99, 0), (2.1, 1)):
        assert len(wrong_losses([1.0, far], [1.0, 2.0], exact=False)) == complaints
    assert wrong_losses([1.0], [1.0, 2.0], exact=False)


def test_a_run_without_a_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert wrong_checkpoint(tmp_path, 4)


def test_a_way_back_to_storage_needs_the_death_of_all_copies() -> None:
    def told(lost: list[str]) -> list[dict[str, Any]]:
        view = {"event": "view", "generation": 3, "members": ["a", "b", "c", "d"]}
        deaths = [{"event": "worker_lost", "worker": worker} for worker in lost]
        back = {"event": "entered", "generation": 4, "lost_steps": 7}
        return [view, {"event": "entered", "generation": 3, "lost_steps": 0}, *deaths, back]

    assert {event["event"] for event in told(["a"])} <= {kind.name for kind in EVENT_KINDS}
    assert not avoidable_losses(told(["a", "c"]), 1)
    assert avoidable_losses(told(["a", "c"]), 2) == ["7 steps were lost although only 2 of 4 had gone"]
    assert avoidable_losses(told(["x", "a"]), 1) == ["7 steps were lost although only 1 of 4 had gone"]
    assert not avoidable_losses(told(["a", "b", "c", "d"]), 9)
