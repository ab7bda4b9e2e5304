"""Checks of the backend over NCCL on one GPU: `python3 -m scripts.benchmarks.gpu_nccl --json FILE [--only CASE,...]`.

Needs torch built with CUDA, and none of the package's other dependencies than numpy. Every case has processes of its
own and a time limit, prints a line when it ends, and is written to the JSON file then. A failed case does not end the
others. With `--device cpu` those that can run over gloo do so, which checks this script and not NCCL.

Cases:
- facts: versions, functions of NCCL, GPU, host.
- world1: a communicator of one rank, formed and ended 30 times; times, and what stays behind.
- world2, world3: ranks that share the GPU; every operation against the host's backend, and speed over sockets.
- death: a peer is killed or stopped in a loop of operations; 0.2 s later the survivors are told. They must raise within
  a second of that, with the GPU and the state on it unharmed, and form a new group. The same two survivors go through
  all rounds.
- device_wait: the same where the main thread waits for the GPU behind an operation that cannot end.
- forming: a member does not come to the communicator that the others form; the signal has to end that within a second.
- poison: A is told that the generation is over, B half a second after A; in some rounds a third rank C was stopped
  before. Does B complete an operation with wrong bytes meanwhile (`backend.py`)? That is documented; no such operation
  may be attested.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.gpu_world import RankFailed, World

TOLD_AFTER_S = 0.2  # between a peer's end and the survivors' signal
B_AFTER_A_S = 0.5
LATE_S = 1.0  # the longest from the signal to the survivors' exception
START_S = 45.0  # of a rank: imports, and its context on the GPU
ROUND_S = 15.0
SHOWN = 2500  # characters of an error that are printed; the JSON file has all of them
Result = dict[str, Any]


class Run:
    """The options of a run.

    Attributes:
        device: "cuda" or "cpu".
        numel: floats of the all-to-all whose speed is measured, of a rank.
        loop_numel: the same in the loops in which a peer dies.
        repeats: how often each kind of death is tried.
        deadline_s: of the case that runs, on the monotonic clock.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.numel = 16_000_000 if device == "cuda" else 1_000_000
        self.loop_numel = 2_000_000 if device == "cuda" else 50_000
        self.deadline_s = 0.0

    def world(self, count: int) -> World:
        return World(count, self.device, self.deadline_s)


def started(world: World, count: int) -> None:
    """All ranks have a context on the device."""
    for index in range(count):
        world.tell(index, "ready")
    for index in range(count):
        assert world.hear(index, START_S), f"the device of rank {index} computes wrongly"


def facts(run: Run, result: Result) -> bool:
    with run.world(1) as world:
        world.tell(0, "facts")
        result |= world.hear(0, START_S)
    return run.device == "cpu" or (result["nccl"] is not None and result["functions"]["ncclCommRevoke"])


def world1(run: Run, result: Result) -> bool:
    with run.world(1) as world:
        world.tell(0, "alone", 30)
        result |= world.hear(0, 60.0)
    early, late = result["levels"].values()
    result["lost_mib"] = early["free_mib"] - late["free_mib"]
    result["more_threads"] = late["threads"] - early["threads"]
    result["more_descriptors"] = late["descriptors"] - early["descriptors"]
    leaks = result["lost_mib"] > 64 or result["more_threads"] > 3 or result["more_descriptors"] > 3
    return not (leaks or result["wrong"]) and result["form_s"] < 0.5


def world_of(count: int) -> Callable[[Run, Result], bool]:
    """The comparison with the host's backend in a world of so many ranks."""

    def case(run: Run, result: Result) -> bool:
        ranks = result["ranks"] = []
        with run.world(count) as world:
            started(world, count)
            for index in range(count):
                world.tell(index, "compare", 1, index, count, run.numel)
            ranks.extend(world.hear(index, 60.0) for index in range(count))
        result["gb_per_s"] = min(rank["gb_per_s"] for rank in ranks)
        result["small_ms"] = max(rank["small_ms"] for rank in ranks)
        result["wrong"] = sorted({wrong for rank in ranks for wrong in rank["wrong"]})
        return not result["wrong"] and all(rank["error"] < 1e-6 for rank in ranks)

    return case


def death(run: Run, result: Result) -> bool:
    """Ranks 0 and 1 survive; every round has a victim of its own, which stands by until its turn."""
    kinds = [(how, what) for what in ("all_to_all", "all_reduce") for how in ("SIGKILL", "SIGSTOP")] * run.repeats
    rounds = result["rounds"] = []
    while len(rounds) < len(kinds):
        left = kinds[len(rounds) :]
        with run.world(2 + len(left)) as world:
            started(world, 2 + len(left))
            for number, (how, what) in enumerate(left):
                rounds.append({"how": how, "what": what, "passed": False})
                try:
                    rounds[-1] |= _death(run, world, number, how, what)
                except RankFailed as error:  # new processes for the other rounds
                    rounds[-1]["error"] = str(error)
                    break
    passed = [round_ for round_ in rounds if round_["passed"]]
    lates = [found["late_s"] for round_ in passed for found in round_["survivors"] if found["late_s"] is not None]
    result["passed"] = f"{len(passed)} of {len(rounds)}"
    result["failed"] = [(number, one["how"], one["what"]) for number, one in enumerate(rounds) if not one["passed"]]
    result["longest_late_s"] = max(lates, default=None)
    result["longest_form_s"] = max((new["formed_s"] for round_ in passed for new in round_["new"]), default=None)
    result["errors"] = [round_["error"] for round_ in rounds if "error" in round_]
    return len(passed) == len(rounds)


def _death(run: Run, world: World, number: int, how: str, what: str) -> Result:
    """One round: three ranks, of which the victim is another one each time, lose it and go on as two."""
    victim, generation = 2 + number, 10 * number + 1
    members = [0, 1]
    members.insert(number % 3, victim)
    _loop(run, world, members, generation, what)
    world.signal(victim, getattr(signal, how))
    time.sleep(TOLD_AFTER_S)
    for index in (0, 1):
        world.tell(index, "abort", "a peer was lost")
    survivors = [world.hear(index, ROUND_S) for index in (0, 1)]
    for index in (0, 1):
        world.tell(index, "regroup", generation + 1, index, 2)
    new = [world.hear(index, ROUND_S) for index in (0, 1)]
    world.kill(victim)
    passed = all(map(_survived, survivors)) and all(one["right"] for one in new)
    return {"passed": passed, "survivors": survivors, "new": new}


def _loop(run: Run, world: World, members: list[int], generation: int, what: str) -> None:
    """All members are in a loop of operations."""
    for rank, index in enumerate(members):
        world.tell(index, "loop", generation, rank, len(members), what, run.loop_numel)
    for index in members:
        assert world.hear(index, ROUND_S) == "looping"


def _survived(found: Result) -> bool:
    """A survivor that an error of its own has ended before the signal (`late_s` is None) is fine too."""
    in_time = found["late_s"] is None or found["late_s"] < LATE_S
    return in_time and found["gpu_ok"] and found["state_ok"]


def forming(run: Run, result: Result) -> bool:
    """One of three ranks, another one in the second round, does not come to the communicator that the others form."""
    rounds = result["rounds"] = []
    with run.world(3) as world:
        started(world, 3)
        for number in range(run.repeats):
            generation, missing = 10 * number + 1, 2 * (number % 2)
            present = [index for index in range(3) if index != missing]
            for index in present:
                world.tell(index, "form_without_one", generation, index, 3)
            world.tell(missing, "absent", generation, missing, 3)
            assert world.hear(missing, ROUND_S) == "absent"
            time.sleep(0.5)
            for index in range(3):
                world.tell(index, "abort", f"rank {missing} does not come")
            rounds.append({"missing": missing, "ranks": [world.hear(index, ROUND_S) for index in present]})
            world.hear(missing, ROUND_S)
            for index in range(3):
                world.tell(index, "regroup", generation + 1, index, 3)
            rounds[-1]["new"] = [world.hear(index, ROUND_S) for index in range(3)]
    lates = [found["late_s"] for one in rounds for found in one["ranks"]]
    result["late_s"] = lates
    return all(late_s is not None and late_s < LATE_S for late_s in lates) and all(
        all(found["gpu_ok"] for found in one["ranks"]) and all(new["right"] for new in one["new"]) for one in rounds
    )


def device_wait(run: Run, result: Result) -> bool:
    rounds = result["rounds"] = []
    with run.world(2) as world:
        started(world, 2)
        for number in range(3 * run.repeats):
            how = ("cpu", "synchronize")[number % 2]
            for index in (0, 1):
                world.tell(index, "stand", 10 * number + 1, index, how)
            for index in (0, 1):
                assert world.hear(index, ROUND_S) == "standing"
            time.sleep(0.3)
            world.tell(0, "abort", "rank 1 was evicted")
            rounds.append({"how": how, **world.hear(0, ROUND_S)})
            world.tell(1, "abort", "evicted")
            world.hear(1, ROUND_S)
            for index in (0, 1):
                world.tell(index, "regroup", 10 * number + 2, index, 2)
            rounds[-1]["new"] = [world.hear(index, ROUND_S) for index in (0, 1)]
    result["longest_late_s"] = max((one["late_s"] for one in rounds if one["late_s"] is not None), default=None)
    return all(
        one["late_s"] is not None and one["late_s"] < LATE_S and one["raised"] and one["gpu_ok"]
        and all(new["right"] for new in one["new"])
        for one in rounds
    )  # fmt: skip


def poison(run: Run, result: Result) -> bool:
    """Ranks A, B = 0, 1; in every second round C is another process that is stopped, else only A and B exchange."""
    rounds = result["rounds"] = []
    with run.world(2 + run.repeats) as world:
        started(world, 2 + run.repeats)
        for number in range(6 * run.repeats):
            what, has_c = ("all_to_all", "all_reduce")[number % 2], number < run.repeats
            _loop(run, world, [0, 1, 2 + number] if has_c else [0, 1], number + 1, what)
            if has_c:
                world.signal(2 + number, signal.SIGSTOP)
            time.sleep(TOLD_AFTER_S + 0.003 * number)
            world.tell(0, "abort", "A is told")
            time.sleep(B_AFTER_A_S)
            world.tell(1, "abort", "B is told late")
            found = dict(zip("AB", [world.hear(index, ROUND_S) for index in (0, 1)], strict=True))
            rounds.append({"what": what, "c": has_c, **found})
            if has_c:
                world.kill(2 + number)
    result["b_took_wrong_bytes"] = f"{sum(one['B']['wrong'] > 0 for one in rounds)} of {len(rounds)}"
    result["b_failed_by_itself"] = sum(one["B"]["late_s"] is None for one in rounds)
    return all(one[rank]["wrong_attested"] == 0 for one in rounds for rank in "AB")


# name -> (the case, its limit in seconds, whether it runs over gloo too); the most needed first
CASES: dict[str, tuple[Callable[[Run, Result], bool], float, bool]] = {
    "facts": (facts, 40.0, True),
    "world1": (world1, 40.0, False),
    "world2": (world_of(2), 45.0, True),
    "death": (death, 75.0, True),
    "device_wait": (device_wait, 40.0, False),
    "forming": (forming, 40.0, False),
    "poison": (poison, 45.0, True),
    "world3": (world_of(3), 45.0, True),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_nccl", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file that takes the result")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=2, help="of each kind of death")
    parser.add_argument("--limit-s", type=float, default=150.0, help="for all cases together")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; the cases are {', '.join(CASES)}")
    run, began_s = Run(options.device, options.repeats), time.monotonic()
    report: Result = {"device": options.device, "cases": {}}
    for name in names:
        case, limit_s, on_cpu = CASES[name]
        if options.device == "cpu" and not on_cpu:
            continue
        case_s = time.monotonic()
        run.deadline_s = min(case_s + limit_s, began_s + options.limit_s)
        result = report["cases"][name] = {}
        try:
            result["ok"] = case(run, result) if run.deadline_s - case_s > 3.0 else None
        except Exception as error:  # noqa: BLE001 the other cases go on, and the report shows it
            result |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.monotonic() - case_s, 2)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {_line(result)}", flush=True)
    return 0 if all(result["ok"] for result in report["cases"].values()) else 1


def _line(result: Result) -> str:
    """A case in one line, or in more of them after an error."""
    verdict = {True: "ok", False: "FAILED", None: "skipped, no time is left"}[result["ok"]]
    hidden = ("ok", "error", "errors", "seconds", "rounds", "ranks", "levels")
    shown = {name: value for name, value in result.items() if name not in hidden}
    errors = [*result.get("errors", []), *([result["error"]] if "error" in result else [])]
    return "\n".join(
        [f"{verdict}, {result['seconds']} s {json.dumps(_rounded(shown))}", *(error[:SHOWN] for error in errors)]
    )


def _rounded(values: Result) -> Result:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
