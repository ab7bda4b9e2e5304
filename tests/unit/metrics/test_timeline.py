"""A run over wall-clock time: what is drawn is what the records say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from elastic_moe.errors import UserError
from elastic_moe.metrics.report.timeline import JOINED, LEFT, LOST, RESUMED, Mark, Timeline, read_timeline, timeline_of
from elastic_moe.metrics.report.timeline_svg import timeline_svg, write_timeline
from tests.declared import assert_declared
from tests.unit.metrics.synthetic import EVENTS, STEPS, lost, step, view, write_run

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_hand_written_run_has_the_declared_records(tmp_path: Path) -> None:
    assert_declared(write_run(tmp_path))


def test_marks_say_who_went_and_came(tmp_path: Path) -> None:
    timeline = read_timeline(write_run(tmp_path))
    lost_two, joined_two, left_one = timeline.marks
    assert lost_two == Mark(2.5, LOST, 2, 1.5), "the next step was committed at 4.0"
    assert joined_two == Mark(4.5, JOINED, 2)
    assert left_one == Mark(7.5, LEFT, 1)
    assert [workers for _, workers in timeline.workers] == [4, 2, 4, 3]
    assert [time_s for time_s, _ in timeline.workers] == pytest.approx([0.0, 2.8, 4.5, 7.5])
    assert timeline.steps == 7
    assert timeline.lost_steps == 0
    assert timeline.end_s == 8.0


def test_a_worker_that_was_no_member_is_not_marked() -> None:
    events = [*view(0.0, 0, 1, "ab", "start"), lost("z", 1.5, 1, 1)]
    assert timeline_of([step(1, 1.0, 1, 2), step(2, 2.0, 1, 2)], events).marks == ()


def test_a_worker_evicted_and_then_lost_counts_once() -> None:
    evicted = lost("b", 1.5, 1, 1) | {"event": "worker_evicted"}
    events = [*view(0.0, 0, 1, "ab", "start"), evicted, lost("b", 1.6, 1, 1), *view(1.8, 1, 2, "a", "lost b")]
    marks = timeline_of([step(1, 1.0, 1, 2), step(2, 2.0, 2, 1)], events).marks
    assert marks == (Mark(1.5, LOST, 1, 0.5),)


def test_every_committed_token_is_in_the_speed() -> None:
    steps = [step(number, 0.37 * number, 1, 1) for number in range(1, 901)]
    timeline = timeline_of(steps, view(0.0, 0, 1, "a", "start"))
    width_s = timeline.end_s / len(timeline.tokens_per_s)
    assert sum(rate * width_s for _, rate in timeline.tokens_per_s) == pytest.approx(900 * 1000)
    assert [rate for _, rate in timeline.tokens_per_s] == pytest.approx([1000 / 0.37] * len(timeline.tokens_per_s))


def test_a_time_without_steps_shows_as_a_gap_in_the_speed() -> None:
    steps = [step(n, 0.1 * n if n <= 500 else 0.1 * n + 20, 1, 1, step_s=0.1) for n in range(1, 1001)]
    rates = [rate for _, rate in timeline_of(steps, view(0.0, 0, 1, "a", "start")).tokens_per_s]
    assert max(rates) == pytest.approx(10_000)
    assert min(rates) < 100


def test_the_time_between_two_lives_is_cut_out() -> None:
    events = [*view(0.0, 0, 1, "ab", "start"), *view(5000.0, 2, 9, "xyz", "start")]
    steps = [step(1, 1.0, 1, 2), step(2, 2.0, 1, 2), step(3, 5001.0, 9, 3), step(4, 5002.0, 9, 3)]
    timeline = timeline_of(steps, events)
    assert timeline.end_s == 4.0
    assert timeline.marks == (Mark(2.0, RESUMED, 3),)
    assert [time_s for time_s, _ in timeline.workers] == [0.0, 2.0]


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    steps = [step(1, 1.0, 1, 1), step(2, 6.0, 1, 1, loss=None)]
    assert [loss for _, loss in timeline_of(steps, []).loss] == [4.9]


def test_the_picture_is_one_small_well_formed_file(tmp_path: Path) -> None:
    target = write_timeline(write_run(tmp_path), tmp_path / "run.svg")
    text = target.read_text()
    assert {"▼ −2 (1.5 s)", "▲ +2", "▽ −1", "loss", "tokens/s", "workers"} <= set(texts(text))
    assert "7 steps, 2 workers lost, 2 joined, no committed steps lost" in texts(text)
    assert "prefers-color-scheme:dark" in text
    assert "href" not in text
    assert "script" not in text
    with pytest.raises(UserError):
        write_timeline(tmp_path / "elsewhere", target)


def test_the_picture_of_a_long_run_stays_small() -> None:
    events = view(0.0, 0, 1, "ab", "start")
    for n in range(200):
        there, back = ("a", "ab") if n % 2 == 0 else ("b", "ab")
        events += [
            lost("b" if there == "a" else "a", 40.0 * n + 5, n, 2 * n + 2),
            *view(40.0 * n + 6, n, 2 * n + 2, there, "lost"),
        ]
        events += view(40.0 * n + 20, n, 2 * n + 3, back, "join")
    steps = [step(n, 0.1 * n, 1, 2, step_s=0.1) for n in range(1, 80_001)]
    assert len(timeline_svg(timeline_of(steps, events))) < 150_000
    assert len(timeline_svg(timeline_of(steps, events[:22]))) < 30_000


def test_marks_that_are_close_share_a_label_with_their_sum() -> None:
    marks = (Mark(50.0, JOINED, 1), Mark(50.5, JOINED, 1), Mark(90.0, JOINED, 3))
    curve = [(1.0, 2.0), (100.0, 1.0)]
    labels = texts(timeline_svg(Timeline(100.0, 9, 0, curve, curve, curve, marks), title="a <b> & c"))
    assert [label for label in labels if label.startswith("▲ +")] == ["▲ +2", "▲ +3"]
    assert "a <b> & c" in labels


def test_the_shortest_run_is_drawn() -> None:
    assert "1 step, no workers lost" in timeline_svg(timeline_of(STEPS[:1], EVENTS[:2]))
    assert texts(timeline_svg(timeline_of(STEPS[:1], [])))
