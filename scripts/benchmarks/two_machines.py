"""Two machines on this one: network namespaces that a link of a chosen rate joins, and a Ray node in each.

What ranks of one machine send each other stays on its loopback, and takes no part of the link. Needs root, `ip` and
`tc`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

NET, PORT, LINK = "10.214.9", 6400, "em0"
CLONE_NEWNET = 0x40000000
START_TRIES = 4  # of a Ray node, which gives itself 30 s, whatever the machine's load


def enter(network: str) -> None:
    """From now on this process is on that machine.

    Raises:
        OSError: it may not be.
    """
    with open(f"/var/run/netns/{network}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {network}")


class TwoMachines:
    """The two machines, with a Ray cluster over both.

    Args:
        rate: of the link in each direction, as `tc` writes it.
        workers_each: CPUs of each Ray node.

    Attributes:
        networks: names of the namespaces.
        address: of the Ray cluster.
        variables: of the environment of programs that use the cluster.
    """

    def __init__(self, rate: str, workers_each: int) -> None:
        self.networks = [f"emoe{os.getpid()}m{number}" for number in range(2)]
        self.address = f"{NET}.10:{PORT}"
        self._rate, self._cpus = rate, workers_each
        self._stack = ExitStack()
        self.variables: dict[str, str] = {}

    def __enter__(self) -> TwoMachines:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="emoe-ray", ignore_cleanup_errors=True))
        (Path(folder) / "ray").mkdir()
        self.variables = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        self._stack.callback(self._end)
        try:
            self._connect()
            self._start_ray(0, "--head", f"--port={PORT}", "--include-dashboard=false", "--ray-client-server-port=6499")
            self._start_ray(1, f"--address={self.address}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def inside(self, machine: int) -> list[str]:
        """What a command begins with to run on that machine."""
        return ["ip", "netns", "exec", self.networks[machine]]

    def _connect(self) -> None:
        ends = [f"em{os.getpid() % 100_000}{number}" for number in range(2)]
        for name in self.networks:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(self.networks, ends, strict=True)):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", end, "name", LINK)
            _ip("-n", name, "addr", "add", f"{NET}.{10 + number}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
            shape = ["tc", "qdisc", "add", "dev", LINK, "root", "tbf", "rate", self._rate]
            subprocess.run([*self.inside(number), *shape, "burst", "512kb", "latency", "400ms"], check=True)

    def _start_ray(self, machine: int, *arguments: str) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        where = [f"--node-ip-address={NET}.{10 + machine}", f"--num-cpus={self._cpus}"]
        command = [*self.inside(machine), ray, "start", *where, "--object-store-memory=80000000", *arguments]
        for left in reversed(range(START_TRIES)):
            done = subprocess.run(command, env=os.environ | self.variables, capture_output=True, text=True)
            if done.returncode == 0:
                return
            if not left:
                raise RuntimeError(f"no Ray node started on {self.networks[machine]}: {done.stdout}{done.stderr}")
            time.sleep(1.0)

    def _end(self) -> None:
        """End the processes of this cluster, by their environment, and remove the namespaces."""
        ours: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == self.variables["RAY_TMPDIR"]:
                    ours += [process, *process.children(recursive=True)]
        for process in ours:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(ours, timeout=10)
        for name in self.networks:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
