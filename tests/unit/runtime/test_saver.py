"""When a checkpoint is due: by steps, by the clock, and because the coordinator asks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_moe.config.schema import CheckpointConfig, OptimConfig, RunConfig, TrainConfig
from elastic_moe.control.spikes import DataPosition
from elastic_moe.coordination.save_steps import SaveSteps
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.saver import Saver


class Rank:
    """A saver whose clock, state and coordinator the test sets; `saved` has the steps that it saved."""

    def __init__(self, skipped: int = 0, **checkpoint: Any) -> None:
        self.now_s, self.asked, self.saved = 1000.0, -1, list[int]()
        self.local = LocalState(committed=0, position=DataPosition(skipped))
        config = TrainConfig(checkpoint=CheckpointConfig(**checkpoint))
        writer = cast(Any, SimpleNamespace(save=lambda step, *_: self.saved.append(step)))
        reporter = cast(Any, None)
        self.saver = Saver(config, self.local, writer, reporter, lambda: self.asked, lambda: self.now_s)
        self.context = cast(Any, SimpleNamespace(rank=0, held=None, layout=Layout()))
        self.saver.begin_view()

    def steps(self, count: int, seconds: float = 1.0) -> None:
        """Make so many steps, each of so many seconds, in a group of one."""
        for _ in range(count):
            self.now_s += seconds
            wished = self.saver.wishes()
            self.local.committed += 1
            self.saver.save_if_due(self.context, wished)


class Layout:
    """The layout of a rank that owns nothing."""

    view = SimpleNamespace(generation=1, active_ranks=(0,))

    @property
    def ownership(self) -> Any:
        return SimpleNamespace(owned=lambda _: SimpleNamespace(tolist=list))


def test_by_steps() -> None:
    rank = Rank(every_steps=4)
    rank.steps(9)
    assert rank.saved == [4, 8]


def test_by_the_clock_and_not_at_all() -> None:
    rank = Rank(every_steps=0, every_minutes=0.5)
    rank.steps(10, seconds=12)
    assert rank.saved == [3, 6, 9]
    rank = Rank(every_steps=0)
    rank.steps(10, seconds=10_000)
    assert rank.saved == []


def test_what_stays_is_saved_between_the_others_and_before_a_decay() -> None:
    rank = Rank(every_steps=4, keep_every_steps=3)
    rank.steps(9)
    assert rank.saved == [3, 4, 6, 8, 9]
    wsd = OptimConfig(schedule="wsd", decay_fraction=0.2, warmup_steps=1)
    decays = TrainConfig(run=RunConfig(steps=12), optim=wsd, checkpoint=CheckpointConfig(every_steps=4))
    steps = SaveSteps(decays)
    assert [step for step in range(13) if steps.due(step)] == [0, 4, 8, 9, 12]
    assert [step for step in range(13) if steps.stays(step)] == [9]
    never = replace(decays, checkpoint=CheckpointConfig(every_steps=0))
    assert not any(SaveSteps(never).stays(step) for step in range(13)), "who wants no checkpoints gets none"


def test_the_clock_counts_from_the_last_checkpoint_whatever_its_cause() -> None:
    rank = Rank(every_steps=4, every_minutes=0.5)
    rank.steps(12, seconds=10)
    assert rank.saved == [3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize("asked", [3, 5])
def test_a_request_is_answered_once_unless_a_checkpoint_answers_it_already(asked: int) -> None:
    rank = Rank(every_steps=4)
    rank.steps(5)
    rank.asked = asked
    rank.steps(2)
    assert rank.saved == ([4] if asked == 3 else [4, 6])


def test_after_going_back_an_old_request_is_answered_once_more_and_new_ones_are_heard() -> None:
    rank = Rank(every_steps=0)
    rank.steps(9)
    rank.asked = 9
    rank.steps(1)
    rank.local.committed = 2
    rank.saver.begin_view()
    rank.steps(3)
    assert rank.saved == [10, 3]
    rank.asked = 11  # the coordinator's count never falls
    rank.steps(3)
    assert rank.saved == [10, 3, 6]


def test_a_step_is_saved_once_in_a_view() -> None:
    rank = Rank(every_steps=4)
    rank.steps(4)
    rank.saver.save(rank.context)
    assert rank.saved == [4]


def test_that_data_was_left_out_is_saved_at_once() -> None:
    """A run that is resumed before the next checkpoint is due would compute the data again that led to a spike."""
    rank = Rank(every_steps=100)
    rank.steps(3)
    assert rank.saved == []
    rank.local.committed, rank.local.position = 0, DataPosition(skipped=3)
    rank.saver.begin_view()
    rank.steps(4)
    assert rank.saved == [1]


def test_data_that_was_left_out_before_a_start_is_no_reason_to_save() -> None:
    rank = Rank(every_steps=100, skipped=7)
    rank.steps(4)
    assert rank.saved == []
