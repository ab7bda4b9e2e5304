"""What the page is drawn from: no spike is lost, workers keep their bars, homes follow workers and not ranks."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe.metrics.report import facts
from elastic_moe.metrics.report.expert_maps import MAX_COLUMNS, ExpertMaps
from elastic_moe.metrics.report.lanes import CUT_OFF, DIED, EVICTED, FINISHED, LEFT, SILENT, STATES, Bar, Lives, lanes
from elastic_moe.metrics.report.run_data import RunReader
from elastic_moe.metrics.report.steps import MAX_POINTS, StepColumns, curves
from tests.unit.metrics.synthetic import START_S, event, lost, step, view, write_run

Json = dict[str, Any]


def write(path: Path, records: list[Json]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TestSteps:
    def test_the_lowest_and_highest_value_of_every_stretch_are_kept(self, tmp_path: Path) -> None:
        count = 7 * MAX_POINTS + 13
        dice = random.Random(1)
        losses = [dice.random() for _ in range(count)]
        losses[4321], losses[5000], losses[6001] = 99.0, -9.0, float("nan")
        records = [{"step": n + 1, "loss": v if v == v else None, "tokens": 2, "time": n} for n, v in enumerate(losses)]
        columns = StepColumns(write(tmp_path / "m", records)).read()
        made = curves(columns, {"tokens": np.cumsum(columns["tokens"])})
        loss = made["y"]["loss"]
        assert len(made["x"]["step"]) == len(loss["mean"]) == MAX_POINTS
        assert made["x"]["step"][-1] == count
        assert made["x"]["tokens"][-1] == 2 * count
        assert max(loss["high"]) == 99.0
        assert min(loss["low"]) == -9.0
        begin = 0
        for end, low, mean, high in zip(made["x"]["step"], loss["low"], loss["mean"], loss["high"], strict=True):
            part = [value for value in losses[begin : int(end)] if value == value]
            assert (low, high) == (pytest.approx(min(part), rel=1e-4), pytest.approx(max(part), rel=1e-4))
            assert mean == pytest.approx(sum(part) / len(part), rel=1e-4)
            begin = int(end)

    def test_a_short_run_is_drawn_step_by_step(self, tmp_path: Path) -> None:
        columns = StepColumns(write(tmp_path / "m", [step(n, n, 1, 1) for n in (1, 2, 3)])).read()
        made = curves(columns, {})
        assert made["y"]["loss"] == {"mean": [4.9, 4.8, 4.7]}
        assert "mtp_loss" not in made["y"]

    def test_it_reads_what_is_new_and_begins_anew_after_a_cut(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m", [step(n, n, 1, 1) for n in range(1, 50)])
        reader = StepColumns(path)
        assert len(reader.read()["step"]) == 49
        read = reader.bytes_read
        line = json.dumps(step(50, 50, 1, 1)) + "\n"
        with path.open("a") as file:
            file.write(line + '{"step": 51, "ti')
        assert reader.read()["step"][-1] == 50
        assert reader.bytes_read == read + len(line), "only the new line was read"
        write(path, [step(n, n, 2, 1) for n in range(1, 52)])
        assert reader.read()["step"].tolist() == list(range(1, 52))

    @pytest.mark.parametrize(
        "damage", ['{"step": 2, "lo\n', '{"step": 2, "time": 2.0, "loss": "high"}\n', "\0\0\n", "[]\n"]
    )
    def test_damaged_lines_are_passed_over(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "m"
        path.write_text(json.dumps(step(1, 1, 1, 1)) + "\n" + damage + json.dumps(step(3, 3, 1, 1)) + "\n")
        columns = StepColumns(path).read()
        known = columns["step"][np.isfinite(columns["loss"])]
        assert known.tolist() == [1, 3]

    def test_an_old_name_of_a_key_is_known(self, tmp_path: Path) -> None:
        old = {"step": 1, "time": 1.0, "rows_between_nodes": 7}
        assert StepColumns(write(tmp_path / "m", [old])).read()["cross_node_rows"].tolist() == [7]


def worker(kind: str, at_s: float, name: str, node: str = "n0", **more: Any) -> Json:
    return event(kind, at_s, 0, 1, worker=name, node=node, pid=1, reason="") | more


def states(bar: Bar) -> list[tuple[str, float, float]]:
    return [(STATES[state], begin - START_S, end - START_S) for begin, end, state in bar.stretches]


class TestLives:
    def bars(self, events: list[Json], goes_on: bool = False) -> dict[str, Bar]:
        found = Lives().bars(events, START_S + 100, goes_on)
        return {
            f"{bar.worker}{sum(b.worker == bar.worker for b in found[:i]) or ''}": bar for i, bar in enumerate(found)
        }

    def test_a_whole_life(self) -> None:
        bars = self.bars(
            [
                worker("worker_connected", 1, "a", placed_s=START_S),
                worker("worker_connected", 1, "b"),
                worker("worker_ready", 2, "a"),
                worker("worker_ready", 3, "b"),
                *view(4, 0, 1, "ab", "start"),
                lost("b", 20, 9, 1),
                *view(20.5, 9, 2, "a", "lost b"),
                worker("drain", 30, "a"),
                worker("worker_left", 31, "a"),
            ]
        )
        assert states(bars["a"]) == [
            ("starting", 0, 2), ("waiting", 2, 4), ("training", 4, pytest.approx(20.4)),
            ("re-forming", pytest.approx(20.4), 20.5), ("training", 20.5, 30), ("draining", 30, 31),
        ]  # fmt: skip
        assert bars["a"].end == LEFT
        assert bars["b"].end == DIED
        assert bars["b"].end_s == START_S + 20

    def test_a_silence_is_shown_from_its_beginning(self) -> None:
        gone = lost("b", 20, 9, 1) | {"event": "worker_evicted", "reason": "silent for 6 s"}
        bars = self.bars([*view(4, 0, 1, "ab", "start"), gone, lost("b", 21, 9, 1)])
        assert bars["b"].end == EVICTED
        assert bars["b"].stretches[-1] == (START_S + 14, START_S + 20, SILENT)

    def test_a_worker_that_comes_back_has_a_second_bar_in_the_same_row(self) -> None:
        gone = lost("b", 20, 9, 1) | {"event": "worker_evicted", "node": "n0"}
        events = [worker("worker_connected", 0, "b"), *view(4, 0, 1, "ab", "start"), gone]
        bars = self.bars([*events, worker("worker_readmitted", 25, "b"), *view(26, 9, 3, "ab", "join")], goes_on=True)
        assert bars["b1"].end == ""
        drawn = lanes(list(bars.values()), lambda time: time - START_S)
        assert {bar["row"] for bar in drawn["bars"] if bar["worker"] == "b"} == {0}

    def test_a_run_that_was_killed_ends_its_bars_before_the_next_start(self) -> None:
        first = [*view(4, 0, 1, "ab", "start"), event("finished", 50, 9, 1, reason="")]
        assert {bar.end for bar in self.bars(first).values()} == {FINISHED}
        bars = self.bars(
            [*view(4, 0, 1, "ab", "start"), worker("worker_connected", 60, "c"), *view(70, 9, 1, "c", "start")]
        )
        assert bars["a"].end == bars["b"].end == CUT_OFF
        assert bars["a"].end_s < START_S + 60

    def test_of_very_many_nodes_those_where_something_happened_are_drawn(self) -> None:
        bars = [Bar(f"w{n}", f"n{n}", 1, [(0.0, 9.0, 2)], DIED if n == 999 else FINISHED) for n in range(1000)]
        drawn = lanes(bars, float)
        assert "w999" in {bar["worker"] for bar in drawn["bars"]}
        assert drawn["hidden"] == 1000 - len(drawn["bars"]) > 0


def placement(number: int, cause: str, moves: list[list[int]], workers: str = "") -> Json:
    ranks = {"ranks": [[name, "n"] for name in workers]} if workers else {}
    return event("placement", number, number, 1, cause=cause, shape=[1, 4], moves=moves) | ranks


def homes(ranks: list[int]) -> list[list[int]]:
    return [[0, expert, rank, kind] for expert, rank in enumerate(ranks) for kind in (1, 2)]


class TestExpertMaps:
    def test_a_home_that_stays_on_its_worker_keeps_its_colour(self, tmp_path: Path) -> None:
        """The worker of rank 0 leaves, so that all others get another rank: one home of four moves."""
        records = [
            placement(0, "membership", homes([0, 1, 2, 3]), "abcd"),
            placement(9, "membership", homes([0, 0, 1, 2]), "bcd"),
        ]
        drawn = ExpertMaps(write(tmp_path / "e", records)).read()
        assert drawn is not None
        assert drawn["workers"] == [[name, "n"] for name in "abcd"]
        assert drawn["home"] == [[[0, 0, 1, 1], [0, 1], [0, 2], [0, 3]]]
        assert drawn["moved"] == [1]

    def test_loads_are_added_up_when_columns_are_joined(self, tmp_path: Path) -> None:
        records = [placement(0, "membership", homes([0, 0, 1, 1]), "ab")]
        steps = range(1, 40 * MAX_COLUMNS)
        records += [event("expert_load", n, n, 1, steps=1, load=[[10, 20, 30, 20]]) for n in steps]
        path = write(tmp_path / "e", records[:-5])
        maps = ExpertMaps(path)
        maps.read()
        write(path, records)
        drawn = maps.read()
        assert drawn is not None
        assert MAX_COLUMNS / 2 <= len(drawn["steps"]) <= MAX_COLUMNS
        assert drawn["steps"][-1] == 40 * MAX_COLUMNS - 1
        code = np.rint(drawn["octave"] * np.log2(1 + np.array([0.5, 1.0, 1.5, 1.0])))
        loads = np.frombuffer(base64.b64decode(drawn["load"][0]), dtype=np.uint8).reshape(4, -1)
        assert (loads == code[:, None]).all()

    def test_steps_that_were_made_again_replace_the_old_ones(self, tmp_path: Path) -> None:
        records = [
            placement(0, "membership", homes([0, 0, 1, 1]), "ab"),
            *(event("expert_load", n, n, 1, steps=1, load=[[1, 1, 1, 1]]) for n in (10, 20, 30)),
            placement(15, "membership", homes([0, 0, 0, 0]), "a"),
        ]
        drawn = ExpertMaps(write(tmp_path / "e", records)).read()
        assert drawn is not None
        assert drawn["steps"] == [0, 10, 15]


class TestFacts:
    def test_no_login_is_shown(self) -> None:
        text = "dir: s3://KEY:SECRET@bucket/a?region=x&session_token=T&scheme=http"
        assert facts.without_secrets(text) == "dir: s3://...@bucket/a?region=x&session_token=...&scheme=http"

    def test_changed_keys_and_the_command(self, tmp_path: Path) -> None:
        run = write_run(tmp_path)
        (run / "config.yaml").write_text("optim: {lr: 0.25}\nseed: 0\ncheckpoint: {dir: 's3://a:b@c'}\n")
        (run / "configs").mkdir()
        newest = {"command": ["elastic-moe", "train", "checkpoint.dir=s3://a:b@c"], "versions": {"torch": "2"}}
        (run / "configs" / "0001.start.json").write_text("{}")
        (run / "configs" / "0002.start.json").write_text(json.dumps(newest))
        drawn = RunReader(run).read()
        assert drawn["config"]["changed"] == {"optim.lr": [0.002, 0.25], "checkpoint.dir": ["", "s3://...@c"]}
        assert drawn["start"]["command"][-1] == "checkpoint.dir=s3://...@c"
        assert drawn["start"]["versions"] == {"torch": "2"}

    def test_what_hydra_kept_of_an_older_run_is_its_command(self, tmp_path: Path) -> None:
        run = write_run(tmp_path)
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text("- run.steps=7\n")
        assert RunReader(run).read()["start"]["command"] == ["elastic-moe", "train", "run.steps=7"]


def test_steps_that_the_run_went_back_behind_are_drawn_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write(run / "metrics.t1.jsonl", [step(5, 5.0, 1, 4), step(6, 5.5, 1, 4)])
    (old,) = RunReader(run).read()["abandoned"]
    assert old["loss"] == [4.5, 4.4]
    assert old["x"]["step"] == [5, 6]


def test_cost_is_that_of_the_books(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert RunReader(run).read()["units"]["cost"] == "worker hours"
    line = {"worker_s": {"training": 1.0}, "total_s": 3600.0}
    books = [line | {"time": START_S + at, "cost": cost} for at, cost in ((0, 0.0), (8, 16.0))]
    write(run / "goodput.jsonl", books)
    drawn = RunReader(run).read()
    assert drawn["units"]["cost"] == "price"
    assert drawn["curves"]["x"]["cost"][-1] == 16.0
