"""What the benchmarks share: arguments, facts about the machine, progress lines, waiting with a deadline, the JSON
file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from elastic_moe.metrics.jsonl import read_jsonl

STARTED_S = time.monotonic()

WIDE = [  # of `model=small`
    "model.hidden_size=512", "model.num_heads=8", "model.head_dim=64", "model.rope_dim=32", "model.value_dim=64",
    "model.kv_latent=128", "model.dense_hidden=1536", "model.num_experts=32", "model.expert_hidden=256",
]  # fmt: skip


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=description)
    parser.add_argument("--json", type=Path, required=True, help="file that takes the result")
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that it works")
    return parser


def say(text: str) -> None:
    """One progress line."""
    print(f"[{time.monotonic() - STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the timings."""
    return {
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "ray", "numpy") if find_spec(name)},
    }


def until(what: str, holds: Callable[[], Any], timeout_s: float, alive: Callable[[], bool] = lambda: True) -> Any:
    """Wait until a condition gives something true, and return that.

    Raises:
        TimeoutError: it did not in time, or what should bring it about has ended.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (found := holds()):
        if not alive():
            raise TimeoutError(f"the run ended while waiting for {what}")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)
    return found


def call(
    words: Sequence[str],
    log: Path,
    limit_s: float,
    variables: Mapping[str, str] | None = None,
    inside: Sequence[str] = (),
) -> None:
    """Run a module of Python to its end, with one thread a process; what it prints is added to `log`.

    Args:
        words: the module, and its arguments.
        log: file.
        limit_s: it gets at most so long.
        variables: of its environment, beside this one's.
        inside: what the command begins with.

    Raises:
        CalledProcessError: it failed.
        TimeoutExpired: it did not end in time.
    """
    with log.open("a") as file:
        subprocess.run(check=True, timeout=limit_s, **_program(words, file, variables, inside))


@contextmanager
def in_progress(
    words: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Callable[[], bool]]:
    """Run a module of Python in a session of its own, with one thread a process, until the block ends.

    Then it is asked to end, and killed with all its processes if it has not after a minute.

    Args:
        words: the module, and its arguments.
        log: file that takes what it prints, added to it.
        variables: of its environment, beside this one's.

    Yields:
        Whether it still runs, as a function.
    """
    with log.open("a") as file:
        process = subprocess.Popen(start_new_session=True, **_program(words, file, variables))
        try:
            yield lambda: process.poll() is None
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _program(
    words: Sequence[str], log: TextIO, variables: Mapping[str, str] | None, inside: Sequence[str] = ()
) -> dict[str, Any]:
    """How a module is run, as arguments for `subprocess`; see `call`."""
    environment = os.environ | dict(variables or {}) | {"OMP_NUM_THREADS": "1"}
    return {"args": [*inside, sys.executable, "-m", *words], "env": environment, "stdout": log, "stderr": log}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Records of a run's file; none before it is there."""
    return read_jsonl(path) if path.exists() else []


def quiet_run(cache: Path, corpus_bytes: int) -> list[str]:
    """Arguments of a run that does nothing besides its steps, on a part of the standard corpus prepared in `cache`."""
    values = [f"data.cache_dir={cache}", f"data.max_bytes={corpus_bytes}", "device=cpu", "tracking.wandb=off"]
    return [*values, "run.eval_every_steps=0", "run.sample_tokens=0"]


def median(values: Sequence[float]) -> float | None:
    """Median, or None of nothing."""
    return statistics.median(values) if values else None


def write(result: dict[str, Any], path: Path) -> None:
    """Write what a benchmark has found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def run(main: Callable[[], dict[str, Any]], path: Path) -> int:
    """Run a benchmark's body, and write what it returns.

    SIGTERM ends it as Ctrl-C does, so that its processes are ended too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        result = main()
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(result, path)
    say(f"wrote {path.name}")
    return 0
