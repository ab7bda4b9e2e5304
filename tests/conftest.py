"""For all tests: a tier by folder, a check that nothing leaks, and a record of how long each test took."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

TIERS = ("unit", "golden", "chaos", "dist", "ray", "gpu")
PATIENCE_S = 60.0  # for what a test has ended, and what has not gone yet, on a loaded machine
DURATIONS = Path(".cache") / "test_durations.json"
NOT_OURS = (
    "RAY_TRAIN_V2_ENABLED",  # set for good by the import of `elastic_moe.actors`, in whatever test that comes first
    "RAY_CLIENT_MODE",  # by that of Ray
    "PYTEST_",
    "COLUMNS",
    "LINES",
    "TORCHINDUCTOR",
    "_TORCHINDUCTOR",
    "TRITON",
    "PYTHONBREAKPOINT",
)  # of pytest, torch, Ray
LASTING_THREADS = (  # threads that a library keeps for the rest of the process, by the beginning of their names
    "ray_",
    "Ray",
    "tqdm",
    "fsspec",
    "asyncio_",
    "InductorSubproc",
    "SubprocPool",
    "pyarrow",
    "execnet",
    "Otel",
)


def pytest_sessionstart() -> None:
    """Start multiprocessing's resource tracker, whose pipe lasts as long as this process does."""
    resource_tracker.ensure_running()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its tier, the folder below tests/ that it lies in, and put the tests with Ray last."""
    root = Path(__file__).parent
    for item in items:
        tier = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if tier in TIERS:
            item.add_marker(tier)
    # Ray leaves threads and connections of its own in the process, which would blur the check for leaks of later tests.
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


# --- durations --------------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write every test's seconds to .cache/test_durations.json, earlier ones kept, and print each tier's sum."""
    seconds: dict[str, float] = {}
    tiers: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
                tier = next((tier for tier in TIERS if f"tests/{tier}/" in report.nodeid), "other")
                tiers[tier] = tiers.get(tier, 0.0) + report.duration
    path = config.rootpath / DURATIONS
    with suppress(OSError):
        known = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**known, **{k: round(v, 3) for k, v in seconds.items()}}, indent=0, sort_keys=True))
    if tiers:
        sums = ", ".join(f"{tier} {total:.0f} s" for tier, total in sorted(tiers.items()))
        terminalreporter.write_line(f"time in tests: {sums}; each test's in {DURATIONS}")


# --- leaks ------------------------------------------------------------------------------------------------------------


class Resources:
    """What a process holds that a test could leave behind."""

    def __init__(self) -> None:
        self.environment = _environment()
        self.threads = set(threading.enumerate())
        self.processes = _children()
        self.descriptors = _descriptors()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}


def _children() -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline()):
                found.add(process)
    return found


def _descriptors() -> dict[int, str]:
    """Open file descriptors of sockets, pipes and files, with their targets.

    A pipe of which this process holds both ends is left out: native libraries make one for waking their threads and
    keep it.
    """
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(("socket:", "pipe:")) or Path(target).is_file():
                found[int(name)] = target
    targets = Counter(found.values())
    return {fd: t for fd, t in found.items() if not (t.startswith("pipe:") and targets[t] > 1)}


def leaks(before: Resources, patience_s: float, count_descriptors: bool = True) -> list[str]:
    """Sentences about everything that is here now and was not before, once it has had `patience_s` seconds to go."""

    def threads() -> list[str]:
        new = [t for t in threading.enumerate() if t not in before.threads and t.is_alive()]
        return [f"thread {t.name}" for t in new if not t.name.startswith(LASTING_THREADS)]

    def processes() -> list[str]:
        found = []
        for process in _children() - before.processes:
            with suppress(psutil.Error):
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
        return found

    def descriptors() -> list[str]:
        if not count_descriptors:
            return []
        for collect in (
            lambda: 0,
            gc.collect,
        ):  # garbage may hold descriptors; collecting it takes time in a large process
            collect()
            new = {fd: target for fd, target in _descriptors().items() if before.descriptors.get(fd) != target}
            if not new:
                break
        return [f"file descriptor {fd}: {target}" for fd, target in new.items()]

    found = _after_patience(lambda: [*threads(), *processes(), *descriptors()], patience_s)
    now = _environment()
    changed = {k for k in now.keys() | before.environment.keys() if now.get(k) != before.environment.get(k)}
    return [*found, *(f"environment variable {name}" for name in sorted(changed))]


def _end_compiler_threads() -> None:
    """End the threads, without names of their own, that torch's compiler keeps once it has compiled something."""
    module = sys.modules.get("torch._inductor.async_compile")
    if module is not None and module.AsyncCompile.pool.cache_info().currsize:
        module.AsyncCompile.pool().shutdown()
        module.AsyncCompile.pool.cache_clear()


def _after_patience(look: Callable[[], list[str]], patience_s: float) -> list[str]:
    deadline_s = time.monotonic() + patience_s
    while (found := look()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return found


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process, thread, environment variable or file descriptor that a test leaves behind fails this test.

    Ray keeps connections of its own until the interpreter ends, so descriptors are not counted for tests of the tier
    ray.
    """
    if any(map(request.node.get_closest_marker, ("dist", "golden", "gpu"))):
        from tests.processes import serve

        serve()  # before it is looked what is here: the servers last as long as this process does
    before = Resources()
    yield
    _end_compiler_threads()
    found = leaks(before, PATIENCE_S, count_descriptors=request.node.get_closest_marker("ray") is None)
    if found:
        pytest.fail("the test left behind: " + "; ".join(found), pytrace=False)
