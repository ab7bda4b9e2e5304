"""Records of the experts' loads become rarer as a run becomes long, so that their file stays small."""

from __future__ import annotations

import pytest

from elastic_moe.runtime.reporter import LOAD_NUMBERS, load_interval


@pytest.mark.parametrize(("layers", "experts"), [(58, 256), (1, 8)])
def test_the_file_of_loads_grows_with_the_logarithm_of_the_steps(layers: int, experts: int) -> None:
    numbers, every_steps = layers * experts, 10
    first = LOAD_NUMBERS // numbers
    recorded, covered = 0, 0
    for step in range(every_steps, 1_000_001, every_steps):
        interval = load_interval(step, every_steps, numbers)
        if step % interval == 0:
            assert step <= first * every_steps or step <= 2 * first * interval
            recorded, covered = recorded + 1, step
    assert covered > 1_000_000 - 2 * load_interval(1_000_000, every_steps, numbers)
    assert recorded * numbers < 6 * LOAD_NUMBERS
    assert recorded == 100_000 if numbers == 8 else recorded < 2000


def test_the_interval_is_the_configured_one_at_first_and_then_doubles() -> None:
    half = LOAD_NUMBERS // 2  # two records at the first interval
    steps = [10, 20, 21, 40, 41, 80, 81, 160]
    assert [load_interval(step, 10, half) for step in steps] == [10, 10, 20, 20, 40, 40, 80, 80]
    assert load_interval(1, 3, 2 * LOAD_NUMBERS) == 3
