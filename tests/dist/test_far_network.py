"""Whole runs over a slow network that loses packets: 200 ms for a round trip, and one packet in twenty is lost.

Every worker has a network namespace of its own. Its only way out is a TUN device, whose packets this process forwards:
late, or never. The kernel's `netem` would do the same, where it is built in. Skipped where namespaces or TUN devices
cannot be made.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist.test_netns import NetworkRun, ip, remove
from tests.local_run import LocalRun, tiny_config

NET = "10.213.9"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000  # as between machines of a cloud
ONE_WAY_S, LOST = 0.1, 0.05
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
STEPS, KILLED_AT = 14, 7

pytestmark = pytest.mark.timeout(900)


class FarNetwork:
    """This process's side of the TUN devices of all namespaces, and of one more for the host itself."""

    def __init__(self, workers: int, seed: int) -> None:
        self.names = [f"emoe{os.getpid()}f{i}" for i in range(workers)]
        self.host = f"{NET}.1"
        self.forwarded = self.lost = 0
        self._dice = random.Random(seed)
        self._devices: dict[bytes, int] = {}  # address -> file descriptor
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="far-network", daemon=True)

    def __enter__(self) -> FarNetwork:
        try:
            self._add(None, 1)
            for i, name in enumerate(self.names):
                ip("netns", "add", name)
                self._add(name, 10 + i)
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()
        for device in self._devices.values():
            os.close(device)  # the interface goes with it
        remove(self.names, [])

    def _add(self, namespace: str | None, number: int) -> None:
        """Make a device, in a namespace or on the host, with the address NET.number."""
        name = f"emt{os.getpid() % 1_000_000}x{number}"
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._devices[bytes(map(int, f"{NET}.{number}".split(".")))] = device
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        inside = ["-n", namespace] if namespace else []
        if namespace:
            ip("link", "set", name, "netns", namespace)
        ip(*inside, "addr", "add", f"{NET}.{number}/24", "dev", name)
        ip(*inside, "link", "set", name, "mtu", str(MTU), "up")

    def _forward(self) -> None:
        waiting: list[tuple[float, int, bytes]] = []  # (when it is due, number, packet)
        number = 0
        while not self._ending.is_set():
            due_s = waiting[0][0] - time.monotonic() if waiting else 1.0
            readable, _, _ = select.select(list(self._devices.values()), [], [], min(0.1, max(0.0, due_s)))
            for device in readable:
                packet = os.read(device, MTU)
                if packet[0] >> 4 != 4:
                    continue  # the kernel's own greetings in IPv6
                number += 1
                if self._dice.random() < LOST:
                    self.lost += 1
                else:
                    heapq.heappush(waiting, (time.monotonic() + ONE_WAY_S, number, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, packet = heapq.heappop(waiting)
                if (target := self._devices.get(packet[16:20])) is not None:
                    os.write(target, packet)
                    self.forwarded += 1


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """Skips where this process may not make namespaces and TUN devices."""
    try:
        with FarNetwork(1, 0):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, ip, network namespaces and TUN devices: {error}")


def test_nobody_is_left_out_and_a_death_is_survived(tmp_path: Path) -> None:
    """With the heartbeats, time-outs and leases that a run has by default."""
    config = tiny_config(tmp_path / "run", CORPUS, heartbeat_s=0.5, heartbeat_timeout_s=6.0, join_settle_s=0.5)
    config = replace(config, run=replace(config.run, steps=STEPS), optim=replace(config.optim, schedule="constant"))
    with LocalRun(replace(config, run=replace(config.run, dir=str(tmp_path / "near" / "run"))), 1) as run:
        run.wait_end()
        expected = run.losses()
    with FarNetwork(3, seed=1) as network, NetworkRun(config, 3, network) as run:
        run.wait_step(KILLED_AT)
        status = run.coordinator.status()
        assert (status["world_size"], status["generation"]) == (3, 1), run.events()
        assert not {e["event"] for e in run.events()} & {"worker_evicted", "worker_lost", "worker_set_aside", "suspect"}
        run.signal("w1", signal.SIGKILL)
        run.wait("the view without it", lambda s: s["world_size"] == 2 and s["entered"])
        run.wait_end()
        assert run.losses() == pytest.approx(expected, rel=1e-5)
        events = run.events()
        assert all(e["lost_steps"] == 0 for e in events if e["event"] == "entered")
        assert {e["worker"] for e in events if e["event"] in ("worker_evicted", "worker_lost")} == {"w1"}
        assert network.lost > 50, "the network was too good"
