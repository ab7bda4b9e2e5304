#!/usr/bin/env python3
"""What a machine with one GPU can show: `python3 scripts/gpu_check.py --json FILE [--only NAME,...]`.

Needs torch built with CUDA and the package's other dependencies, and no Ray. Every check is a process of its own with a
time limit, says in a line how it ended, and is in the JSON file from then on. On a machine without a GPU those that
need one are reported as not run, and the others check their own code at a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 2000  # characters of a failed check's output that are kept


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        what: it shows.
        command: arguments of Python; `{json}` is the file that takes its result.
        limit_s: it is ended after so many seconds.
        on_cpu: runs without a GPU too.
    """

    what: str
    command: tuple[str, ...]
    limit_s: float
    on_cpu: bool = False


def kernels(what: str, limit_s: float, name: str) -> Check:
    """A check of `scripts.benchmarks.gpu_kernels`."""
    return Check(what, ("-m", "scripts.benchmarks.gpu_kernels", name, "--json", "{json}"), limit_s, on_cpu=True)


def pytest(what: str, limit_s: float, *arguments: str) -> Check:
    """A check that tests make."""
    return Check(what, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments), limit_s)


def benchmark(what: str, limit_s: float, name: str, *arguments: str) -> Check:
    """A check that a benchmark of a GPU makes."""
    return Check(what, ("-m", f"scripts.benchmarks.{name}", "--json", "{json}", *arguments), limit_s)


KERNEL_TESTS = [f"tests/unit/model/{part}/test_triton.py" for part in ("attention", "experts", "residual")]
CHECKS = {
    "step": kernels("steps of a worker: waits, launches, memory, utilisation", 120, "step"),
    "adamw": kernels("the update has a CPU's bits, at the speed of a copy", 90, "adamw"),
    "grouped": kernels("the experts' products are right, and faster than a loop", 90, "grouped"),
    "speed": benchmark("tokens a second against transformers", 240, "gpu_step"),
    "mhc": benchmark(
        "mHC against the plain residual, whole layers", 120, "model",
        "--only", "mhc", "--sequences", "64", "--rounds", "5", "--fused", "triton",
    ),
    "tests": pytest(
        "the tests of a GPU, but whole runs", 180, "-m", "not slow", "-k", "not interpreter",
        "tests/gpu/test_state.py", "tests/gpu/test_model.py", *KERNEL_TESTS,
    ),
    "runs": pytest("whole runs with deaths and joins", 300, "tests/gpu/test_run.py"),
    "nccl": benchmark("collectives that end at a death", 200, "gpu_nccl"),
}  # fmt: skip
FACTS = """
import json, torch
gpu = torch.cuda.is_available()
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None, "nccl": None}
if gpu:
    facts |= {"gpu": torch.cuda.get_device_name(), "nccl": list(torch.cuda.nccl.version())}
print(json.dumps(facts))
"""


def machine() -> dict[str, Any]:
    """The GPU and the versions, asked in a process of its own, since the GPU may be broken."""
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=120, check=False)
    facts = json.loads(done.stdout) if done.returncode == 0 else {"gpu": None, "error": done.stderr[-TAIL:]}
    return facts | {"python": platform.python_version(), "cpus": os.cpu_count()}


def run(check: Check) -> dict[str, Any]:
    """The check's result: how it ended, its seconds, and what it wrote."""
    with tempfile.TemporaryDirectory(prefix="emoe-gpu") as directory:
        file, began_s = Path(directory) / "result.json", time.monotonic()
        command = [sys.executable, *(word.format(json=file) for word in check.command)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=check.limit_s, check=False
            )
            ended, output = ("passed" if done.returncode == 0 else "failed"), done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            ended, output = f"ended after {check.limit_s:g} s", str(error.stdout or b"") + str(error.stderr or b"")
        result: dict[str, Any] = {"ended": ended, "what": check.what, "seconds": round(time.monotonic() - began_s, 1)}
        if file.exists():
            result["result"] = json.loads(file.read_text())
        if ended != "passed":
            result["output"] = output[-TAIL:]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file that takes the results")
    parser.add_argument("--only", default=",".join(CHECKS), help="names of checks, with commas between them")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(CHECKS)):
        parser.error(f"there is no check {', '.join(unknown)}; the checks are {', '.join(CHECKS)}")
    report: dict[str, Any] = {"machine": machine(), "checks": {}}
    has_gpu = report["machine"]["gpu"] is not None
    for name in names:
        check = CHECKS[name]
        runs = has_gpu or check.on_cpu
        report["checks"][name] = run(check) if runs else {"ended": "not run: no GPU", "what": check.what}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {report['checks'][name]['ended']} ({check.what})", flush=True)
    good = ("passed", "not run: no GPU")
    return 0 if all(result["ended"] in good for result in report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
