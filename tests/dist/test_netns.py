"""Whole runs over real networks: every worker has a network namespace of its own, and a test cuts its ways.

A bridge joins the namespaces, and the coordinator listens on the bridge's address. A cut gives a neighbour a hardware
address that nobody has: packets vanish in silence, as in a broken switch. Skipped where namespaces cannot be made.
What a killed run of these tests left is removed by the next one.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from elastic_moe.config.schema import TrainConfig
from scripts.benchmarks.two_machines import enter
from tests.local_run import LocalRun, tiny_config

NET, NOBODY = "10.213.7", "02:00:00:00:00:99"
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
RTOL = 1e-5
STEPS = 100  # that are compared


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove(namespaces: list[str], bridges: list[str]) -> None:
    """Sockets of the dead that still wait for an answer keep a namespace, and with it its end, for minutes."""
    ends = [f"{bridge}v{i}" for bridge in bridges for i in range(len(namespaces))]
    for name in [*ends, *bridges]:
        subprocess.run(["ip", "link", "del", name], capture_output=True)
    for name in namespaces:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def remove_leftovers() -> None:
    """Remove the namespaces and bridges of test processes that live no more."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split("\n")
    owners = {line.split()[0]: re.match(r"emoe(\d+)w\d+\b", line) for line in listed if line}
    dead = {name: int(found[1]) for name, found in owners.items() if found and not psutil.pid_exists(int(found[1]))}
    remove(list(dead), [bridge_of(pid) for pid in set(dead.values())])


def bridge_of(pid: int) -> str:
    """An interface's name has at most 15 characters, and those of its ends begin with it."""
    return f"em{pid % 1_000_000}"


class Network:
    """A bridge, and namespaces w0, w1, ... that it joins. Worker i has the address NET.(i + 10)."""

    def __init__(self, workers: int) -> None:
        self.names = [f"emoe{os.getpid()}w{i}" for i in range(workers)]
        self.bridge = bridge_of(os.getpid())
        self.host = f"{NET}.1"
        self.ends: list[str] = []

    def __enter__(self) -> Network:
        remove_leftovers()
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("addr", "add", f"{self.host}/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            for i, name in enumerate(self.names):
                end = f"{self.bridge}v{i}"
                ip("netns", "add", name)
                ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", end, "master", self.bridge, "up")
                ip("-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        remove(self.names, [self.bridge])

    def address(self, worker: int) -> str:
        return f"{NET}.{10 + worker}"

    def cut(self, here: int, there: int | None) -> None:
        """Drop all that a worker sends to another; None: to the coordinator."""
        target = self.host if there is None else self.address(there)
        ip("-n", self.names[here], "neigh", "replace", target, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")

    def heal(self, here: int, there: int | None) -> None:
        target = self.host if there is None else self.address(there)
        ip("-n", self.names[here], "neigh", "del", target, "dev", "eth0")


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """Skips where this process may not make namespaces and a bridge, or put an address on it."""
    try:
        with Network(1):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, ip, and network namespaces: {error}")


pytestmark = pytest.mark.timeout(600)


def _work_inside(config: TrainConfig, address: tuple[str, int], prepared: Any, worker: str, node: str) -> None:
    """A worker's process; its node is the name of its namespace."""
    enter(node)
    LocalRun.work(config, address, prepared, worker, node)


class Namespaces(Protocol):
    """Namespaces for workers, and the address of the host that they reach."""

    names: list[str]
    host: str


class NetworkRun(LocalRun):
    """A run whose workers are in the namespaces of a network, one in each."""

    work = staticmethod(_work_inside)

    def __init__(self, config: TrainConfig, workers: int, network: Namespaces) -> None:
        self.network = network
        super().__init__(config, workers, host=network.host)

    def add(self, node: str = "") -> str:
        return super().add(node or self.network.names[len(self.processes)])

    def end(self, expected: list[float]) -> list[dict[str, Any]]:
        """Let the run make some steps more, and end it. Its losses are those of an undisturbed run."""
        self.wait_step(max(STEPS, self.coordinator.status()["step"] + 10))
        self.coordinator.submit({"event": "stop"})
        self.wait_end()
        assert self.losses()[:STEPS] == pytest.approx(expected, rel=RTOL)
        events = self.events()
        assert all(e["lost_steps"] == 0 for e in events if e["event"] == "entered")
        return events

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events() if e["event"] == event]


def config_of(path: Path, **elastic: Any) -> TrainConfig:
    values = {"heartbeat_timeout_s": 4.0, "lease_s": 8.0, "hang_timeout_s": 64.0, "max_workers": 3} | elastic
    config = tiny_config(path / "run", CORPUS, **values)
    return replace(config, run=replace(config.run, steps=100_000), optim=replace(config.optim, schedule="constant"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    config = config_of(tmp_path_factory.mktemp("base"))
    with LocalRun(replace(config, run=replace(config.run, steps=STEPS)), 1) as run:
        run.wait_end()
        return run.losses()


def test_a_worker_cut_from_the_coordinator_alone_comes_back(tmp_path: Path, expected: list[float]) -> None:
    with Network(3) as network, NetworkRun(config_of(tmp_path), 3, network) as run:
        run.wait_step(10)
        network.cut(1, None)
        run.wait("its removal", lambda s: s["world_size"] == 2 and s["entered"])
        network.heal(1, None)
        run.wait("its return", lambda s: s["world_size"] == 3 and s["entered"])
        run.end(expected)
        assert [e["worker"] for e in run.named("worker_readmitted")] == ["w1"]


@pytest.mark.parametrize("ways", [[(1, 2), (2, 1)], pytest.param([(0, 1)], marks=pytest.mark.long), [(2, 0)]])
def test_of_two_workers_cut_from_each_other_one_waits_and_comes_back(
    tmp_path: Path, expected: list[float], ways: list[tuple[int, int]]
) -> None:
    """Both ways, or one way: no collective fails, and all would wait for one another."""
    with Network(3) as network, NetworkRun(config_of(tmp_path), 3, network) as run:
        run.wait_step(10)
        for way in ways:
            network.cut(*way)
        run.wait("the view without one of them", lambda s: s["world_size"] == 2 and s["entered"])
        (aside,) = run.named("worker_set_aside")
        assert aside["worker"] in {f"w{i}" for i in ways[0]}
        for way in ways:
            network.heal(*way)
        run.wait("its return", lambda s: s["world_size"] == 3 and s["entered"])
        run.end(expected)
        assert not run.named("worker_evicted")
        assert not run.named("worker_lost")


@pytest.mark.parametrize("way", [(2, 0), pytest.param((0, 2), marks=pytest.mark.long)])
def test_a_joiner_that_lacks_a_link_disturbs_nobody(
    tmp_path: Path, expected: list[float], way: tuple[int, int]
) -> None:
    with Network(3) as network, NetworkRun(config_of(tmp_path), 2, network) as run:
        run.wait_step(10)
        network.cut(*way)
        run.add()
        run.wait("the refusal", lambda _: bool(run.named("worker_set_aside")))
        assert run.coordinator.status()["generation"] == 1
        assert "it cannot reach w0" in run.named("worker_set_aside")[0]["reason"]
        network.heal(*way)
        run.wait("its entry", lambda s: s["world_size"] == 3 and s["entered"])
        run.end(expected)
        assert run.coordinator.status()["generation"] == 2


def test_no_namespace_is_left_behind() -> None:
    assert f"emoe{os.getpid()}" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
