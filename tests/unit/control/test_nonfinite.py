"""Counting steps that are not finite: by worker if it was alone, and in a row."""

from __future__ import annotations

from elastic_moe.control.nonfinite import NonFiniteCount


def test_a_worker_that_is_alone_again_and_again_is_counted_over_good_steps_too() -> None:
    count = NonFiniteCount()
    for _ in range(3):
        count = count.after(True, ["a"], 4).after(False, [], 4)
    assert count == NonFiniteCount(0, {"a": 3})


def test_several_at_once_or_nobody_blame_no_worker() -> None:
    count = NonFiniteCount().after(True, ["a", "b"], 4).after(True, [], 4)
    assert count == NonFiniteCount(2, {})


def test_one_that_computes_by_itself_is_not_told_from_its_data() -> None:
    assert NonFiniteCount().after(True, ["a"], 1) == NonFiniteCount(1, {})


def test_an_update_ends_the_row() -> None:
    count = NonFiniteCount().after(True, [], 2).after(True, [], 2)
    assert count.in_a_row == 2
    assert count.after(False, [], 2).in_a_row == 0
