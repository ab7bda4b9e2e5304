"""Soak: whole runs on simulated clusters under random faults, `python -m scripts.chaos --hours N --seed S --out JSON`.

Each run is the real program on four Ray nodes with one worker each, and ends with the checks of
`scripts/benchmarks/chaos_run.py`. Its losses are compared, bit for bit, with those of an undisturbed run. With `--mix`
every few runs train something else (`scripts/benchmarks/chaos_recipes.py`), and have an undisturbed run of their own;
where sums are not exact, losses are to be near. The file is written anew after every run, so an interrupted soak leaves
what it has found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from scripts.benchmarks.chaos_cluster import ROOT, adopt_orphans, can_reset, descendants
from scripts.benchmarks.chaos_faults import WEIGHTS, schedule
from scripts.benchmarks.chaos_recipes import Recipe, draw_recipe
from scripts.benchmarks.chaos_run import wrong_losses
from scripts.benchmarks.common import machine, say

PATIENCE_S = 1000.0  # for one run, and its cluster's start
BATCH, OF_ONE_RECIPE = 6, 2  # runs on one cluster; and with `--mix`
CLUSTERS_FAILED = 10  # clusters that did not start or end well, after which the soak ends
STOPPED = (0, 143, -signal.SIGTERM)  # exit codes of a process that ended well or was asked to

Json = dict[str, Any]


class Batch:
    """Some runs that share a cluster, in a process of its own.

    Args:
        places: directory of each run.
        settings: of each run.
    """

    def __init__(self, places: list[Path], settings: list[Json]) -> None:
        for place, each in zip(places, settings, strict=True):
            place.mkdir(parents=True)
            (place / "settings.json").write_text(json.dumps(each))
        command = [sys.executable, "-m", "scripts.benchmarks.chaos_run", *map(str, places)]
        self._log = places[0].parent / f"{places[0].name}.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def outcome(self, place: Path) -> Json | None:
        """Wait for a run's outcome. Returns None if it did not begin: another one failed, or the cluster did."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            ended = self._process.poll()
            if (place / "outcome.json").exists():
                return json.loads((place / "outcome.json").read_text())
            if ended is not None:
                if not (place / "driver.log").exists():
                    return None
                break
            time.sleep(0.5)
        return {"failed": [f"the run gave no outcome: {self._last_line()}"]}

    def _last_line(self) -> str:
        return (self._log.read_text().strip().splitlines() or ["it said nothing"])[-1]

    def stop(self) -> None:
        """Ask the process to end now."""
        self._process.terminate()

    def close(self) -> list[str]:
        """Wait for the process's end. Returns complaints; nothing of it is left then."""
        failed: list[str] = []
        try:
            if self._process.wait(PATIENCE_S / 5) not in STOPPED:
                failed.append(self._last_line())
        except subprocess.TimeoutExpired:
            failed.append("the cluster does not end")
        for left in descendants():
            with suppress(psutil.Error):
                left.send_signal(signal.SIGCONT)
                left.kill()
        return failed


def draw(seed: int, steps: int, cache: Path, kinds: tuple[str, ...], recipe: Recipe) -> Json:
    """The settings of one run that trains the recipe."""
    rng = random.Random(f"settings {seed}")
    faults = schedule(seed, steps, kinds)
    return {
        "seed": seed,
        "steps": steps,
        "redundancy": rng.choice([1, 2]),
        "recipe": recipe.words,
        "exact": recipe.exact,
        "faulty_storage": any(fault["kind"] == "storage" for fault in faults),
        "cache": str(cache),
        "schedule": faults,
    }


class Soak:
    """Batches of runs until the time is over.

    Args:
        options: of the command line.
        root: directory of the runs' files.

    Attributes:
        result: what is written to the file.
    """

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self._options, self._root = options, root
        self._kinds = tuple(kind for kind in WEIGHTS if can_reset() or not kind.startswith("reset"))
        self._began_s = time.monotonic()
        self._losses: list[float] = []
        self._number = 0
        self.result: Json = {"seed": options.seed, "machine": machine(), "kinds": self._kinds}
        self.result |= {"clusters_failed": [], "runs": []}

    @property
    def over(self) -> bool:
        hours = (time.monotonic() - self._began_s) / 3600
        return self._number >= self._options.runs or hours >= self._options.hours

    def run(self) -> Json:
        """Run batches; the first run of all, or of each recipe, is undisturbed."""
        recipe, mix = Recipe((), exact=True), self._options.mix
        while not self.over and len(self.result["clusters_failed"]) < CLUSTERS_FAILED:
            first = self._number + 1
            if mix:
                recipe, self._losses = draw_recipe(self._options.seed * 1000 + first), []
                say(f"from run {first} on: {' '.join(recipe.words)}")
            numbers = [*([] if self._losses else [0]), *range(first, first + (OF_ONE_RECIPE if mix else BATCH))]
            drawn = [self._draw(number, recipe) for number in numbers]
            places = [self._root / f"run{number}" for number in numbers]
            batch = Batch(places, drawn)
            try:
                self._take_all(batch, numbers, drawn, places)
            finally:
                self._end(batch)
            for place in places:
                shutil.rmtree(place, ignore_errors=True)
        return self.result

    def _take_all(self, batch: Batch, numbers: list[int], drawn: list[Json], places: list[Path]) -> None:
        """Take the outcomes of a batch's runs in turn, up to the first failure."""
        for number, settings, place in zip(numbers, drawn, places, strict=True):
            if (number and self.over) or (outcome := batch.outcome(place)) is None:
                return
            self._number = number or self._number
            self._take(settings, outcome, place)
            if outcome["failed"]:
                return

    def _draw(self, number: int, recipe: Recipe) -> Json:
        seed = self._options.seed * 1000 + number
        settings = draw(seed, self._options.steps, self._root / "cache", self._kinds, recipe)
        return settings if number else settings | {"schedule": [], "faulty_storage": False}

    def _take(self, settings: Json, outcome: Json, place: Path) -> None:
        """Compare a run's losses, and write its outcome."""
        found = outcome.pop("losses", [])
        if not settings["schedule"]:
            if not outcome["failed"]:
                self._losses = found
                self.result["undisturbed"] = outcome | {"recipe": settings["recipe"], "last_loss": found[-1]}
                say(f"undisturbed: {outcome['seconds']} s, last loss {found[-1]}")
                return
            if not self._options.mix:
                raise SystemExit(f"error: the undisturbed run fails: {outcome['failed']}")
            self._number += 1  # with the next one's recipe
        elif found:
            outcome["failed"] += wrong_losses(found, self._losses, settings["exact"])
        del settings["cache"], settings["schedule"]  # the faults are in the outcome
        self.result["runs"].append(settings | outcome)
        _report(self._number, self.result["runs"][-1])
        if outcome["failed"] and self._options.keep:
            shutil.copytree(place, self._options.keep / place.name, dirs_exist_ok=True)
        self._write()

    def _end(self, batch: Batch) -> None:
        """End a batch, and look at how its cluster ended."""
        if self.over or sys.exc_info()[0] is not None:
            batch.stop()
        if failed := batch.close():
            self.result["clusters_failed"] += failed
            say(f"the cluster: {failed}")
        self._write()

    def _write(self) -> None:
        hours = round((time.monotonic() - self._began_s) / 3600, 3)
        self.result |= summary(self.result["runs"]) | {"hours": hours}
        if self._options.out:
            self._options.out.write_text(json.dumps(self.result, indent=1) + "\n")


def summary(runs: list[Json]) -> Json:
    """Counts of runs, of faults by kind, and of failures."""
    faults = Counter(fault["kind"] for run in runs for fault in run.get("faults", ()))
    failed = [run["seed"] for run in runs if run["failed"]]
    return {"count": len(runs), "faults": dict(sorted(faults.items())), "failed_seeds": failed}


def _report(number: int, run: Json) -> None:
    kinds = " ".join(fault["kind"] + str(fault.get("fault", "")) for fault in run.get("faults", ()))
    verdict = "; ".join(run["failed"]) or "ok"
    say(f"run {number}, seed {run['seed']}, {run.get('seconds')} s, lost {run.get('lost_steps')}: {kinds}: {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos.py", description="Soak: runs under random faults.")
    parser.add_argument("--hours", type=float, default=1.0, help="no run begins later than this")
    parser.add_argument("--runs", type=int, default=1_000_000, help="most runs")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules")
    parser.add_argument("--mix", action="store_true", help="draw what is trained, too, every few runs")
    parser.add_argument("--steps", type=int, default=120, help="training steps of each run")
    parser.add_argument("--out", type=Path, help="file that takes the outcomes")
    parser.add_argument("--keep", type=Path, help="directory that keeps the files of runs that failed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt_orphans()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with tempfile.TemporaryDirectory(prefix="emoe-chaos") as root:
        result = Soak(options, Path(root)).run()
    print(
        f"{result['count']} runs, {sum(result['faults'].values())} faults, failed: {result['failed_seeds'] or 'none'}"
    )
    return 1 if result["failed_seeds"] else 0


if __name__ == "__main__":
    sys.exit(main())
