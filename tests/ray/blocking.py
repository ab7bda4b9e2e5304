"""Ray nodes as a pod or a batch system starts them (`ray start --block`), and a run on them until it is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.actors.cluster import SLOW_START
from elastic_moe.actors.own_node import node_of
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.notices.watch import RayNode
from tests.patience import until
from tests.ray.conftest import Head, free_ports

STARTS_S = 240.0
TRIES = 5
Wrap = Callable[[list[str]], list[str]]


@dataclass
class BlockingNode:
    """A worker node in a process of its own. `process` is that of `ray start --block`."""

    process: subprocess.Popen[bytes]
    log: Path

    def node(self) -> RayNode | None:
        """The Ray node, once its raylet runs."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if found := node_of(child.cmdline()):
                        return found
        return None

    def ready(self) -> bool:
        return self.node() is not None and "runtime started" in self.log.read_text()

    def ended(self) -> bool:
        return self.process.poll() is not None


def start_node(head: Head, name: str, wrap: Wrap = lambda command: command, **env: str) -> BlockingNode:
    """Start a worker node of one CPU, and wait until it has. Two that start at once take each other's sockets.

    Ray gives a node 30 s to start, whatever the load of the machine, so it is tried again. `wrap` changes its command.
    """
    for _ in range(TRIES):
        node = _start(head, name, wrap, env)
        until(lambda node=node: node.ended() or node.ready(), name, STARTS_S)
        if not node.ended():
            return node
        assert SLOW_START in node.log.read_text(), node.log.read_text()
    raise AssertionError(f"{name} did not start in {TRIES} tries")


def _start(head: Head, name: str, wrap: Wrap, env: dict[str, str]) -> BlockingNode:
    program = str(Path(sys.executable).parent / "ray")
    command = [program, "start", "--block", f"--address={head.address}", "--num-cpus=1"]
    command += ["--object-store-memory=80000000", f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    log = head.root / f"{name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(wrap(command), env=head.env | env, cwd=head.root, stdout=output, stderr=output)
    return BlockingNode(process, log)


class RunOnNodes:
    """A run as a process of its own, from the command line, and what its files tell."""

    def __init__(self, directory: Path, process: subprocess.Popen[str], output: Path) -> None:
        self.directory, self.process, self._output = directory, process, output

    def records(self) -> list[dict[str, Any]]:
        assert self.process.poll() is None, self._output.read_text()
        path = self.directory / "metrics.jsonl"
        return list(read_jsonl(path)) if path.exists() else []

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.directory / "events.jsonl"
        return [event for event in read_jsonl(path) if event["event"] == kind] if path.exists() else []

    def wait_size(self, size: int, more_steps: int = 5, within_s: float = 300.0) -> None:
        """Wait until so many workers have made some further steps together."""
        at = (self.records() or [{"step": 0}])[-1]["step"]

        def there() -> bool:
            last = (self.records() or [{"step": 0, "world_size": 0}])[-1]
            return last["world_size"] == size and last["step"] >= at + more_steps

        until(there, f"steps with {size} workers", within_s)

    def finish(self) -> list[int]:
        """Stop the run. Every committed step is there once, and none was made again. Returns the steps."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(300) == 128 + signal.SIGINT, self._output.read_text()
        steps = [int(record["step"]) for record in read_jsonl(self.directory / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        assert all(event["lost_steps"] == 0 for event in self.events("entered"))
        return steps


@contextmanager
def run_on(head: Head, tiny: list[str], tmp_path: Path, workers: int, *overrides: str) -> Iterator[RunOnNodes]:
    """A run with so many workers that goes on until it is stopped."""
    where = ["cluster=address", f"cluster.address={head.address}", f"cluster.workers={workers}"]
    command = [sys.executable, "-m", "elastic_moe.train", *tiny, *where, "run.steps=1000000", *overrides]
    output = tmp_path / "output"
    with open(output, "w+") as file:
        process = subprocess.Popen(command, env=head.env, cwd=tmp_path, stdout=file, stderr=file, text=True)
    try:
        yield RunOnNodes(tmp_path / "run", process, output)
    finally:
        process.kill()
        process.wait()
