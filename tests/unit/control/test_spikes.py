"""What is a spike: by the history, which travels whole."""

from __future__ import annotations

import math
import random
import statistics

from elastic_moe.control.spikes import FEWEST, ROLLBACKS, SIGMAS, WINDOW, DataPosition, RollbackCount, SpikeGuard


def _guard(values: list[tuple[float, float]]) -> SpikeGuard:
    guard = SpikeGuard()
    for value in values:
        guard.add(*value)
    return guard


def _steps(count: int, seed: int = 0) -> list[tuple[float, float]]:
    choose = random.Random(seed)
    return [(3.0 + choose.gauss(0, 0.1), 1.0 + choose.gauss(0, 0.05)) for _ in range(count)]


def test_a_loss_or_a_norm_beyond_the_limit_is_a_spike() -> None:
    steps = _steps(WINDOW)
    guard = _guard(steps)
    losses, norms = zip(*steps, strict=True)
    loss = statistics.fmean(losses) + SIGMAS * statistics.stdev(losses)
    norm = statistics.fmean(norms) + SIGMAS * statistics.stdev(norms)
    assert not guard.is_spike(loss - 1e-6, norm - 1e-6)
    assert guard.is_spike(loss + 1e-6, 1.0)
    assert guard.is_spike(3.0, norm + 1e-6)
    assert not guard.is_spike(0.0, 0.0), "better is no spike"


def test_nothing_is_a_spike_before_there_is_a_history() -> None:
    assert not _guard(_steps(FEWEST - 1)).is_spike(1e9, 1e9)
    assert _guard(_steps(FEWEST)).is_spike(1e9, 1e9)


def test_a_lasting_change_becomes_the_measure_and_old_steps_are_forgotten() -> None:
    guard = _guard(_steps(WINDOW))
    skipped = 0
    for loss, norm in [(loss + 2.0, norm) for loss, norm in _steps(WINDOW, seed=1)]:
        skipped += guard.is_spike(loss, norm)
        guard.add(loss, norm)
    assert 0 < skipped < 20
    assert not guard.is_spike(5.0, 1.0)
    assert guard.is_spike(6.0, 1.0)


def test_the_history_travels_whole_and_replaces_another() -> None:
    for count in (0, 5, WINDOW, WINDOW + 9):
        guard, other = _guard([*_steps(count), (math.nan, 1.0)]), _guard(_steps(70, seed=2))
        other.load(guard.pack())
        assert other.pack().tobytes() == guard.pack().tobytes()
        assert len(guard.pack()) == 2 * WINDOW


def test_a_run_that_goes_back_leaves_out_the_batches_up_to_the_spikes() -> None:
    start = DataPosition()
    assert [start.batch_of(step) for step in (1, 2, 3)] == [0, 1, 2]
    first = start.after_spike(200).back_at(150, 0)
    assert first.batch_of(151) == start.batch_of(200) + 1
    again = first.after_spike(160).back_at(150, 0)  # of the checkpoint before the first spike
    assert again.batch_of(151) == first.batch_of(160) + 1
    later = first.after_spike(210).back_at(200, first.skipped)  # of one that was made after it
    assert later.batch_of(201) == first.batch_of(210) + 1
    assert DataPosition().back_at(200, first.skipped).batch_of(201) == first.batch_of(201)  # a resumed run


def test_one_rank_that_knows_of_the_spike_is_enough() -> None:
    knows, does_not = DataPosition(5).after_spike(200), DataPosition(5)
    assert DataPosition.agreed([does_not, knows, does_not]) == knows


def test_a_run_that_comes_no_further_than_its_spike_ends_however_many_steps_it_makes_again() -> None:
    count = RollbackCount()
    for _ in range(ROLLBACKS):
        for step in range(1, 10 * FEWEST):
            count.after_update(step)
        assert count.after_spike(10 * FEWEST)
    assert not count.after_spike(9 * FEWEST)


def test_a_run_that_gets_on_may_go_back_again() -> None:
    count = RollbackCount()
    for spiked in range(100, 1000, 100):
        for step in range(spiked - 50, spiked + FEWEST + 1):
            count.after_update(step)
        assert count.after_spike(spiked + FEWEST + 1)
