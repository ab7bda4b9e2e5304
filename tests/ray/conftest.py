"""A small real Ray cluster of several nodes in one machine, in its own temporary directory; nothing is left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
from ray.cluster_utils import Cluster

from elastic_moe.actors.cluster import SLOW_START
from elastic_moe.actors.link import NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
START_TRIES = 4


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with a head node without CPUs; a test adds the nodes it needs."""
    temp_dir = tempfile.mkdtemp(prefix="emoe")
    os.mkdir(os.path.join(temp_dir, "ray"))
    monkeypatch.setenv("RAY_TMPDIR", temp_dir)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}", prepend=os.pathsep)
    cluster = Cluster()
    try:
        spared = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}  # nobody asks them
        cluster.add_node(num_cpus=0, object_store_memory=80 * 1024 * 1024, **spared)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        left = _living(temp_dir)
        shutil.rmtree(temp_dir, ignore_errors=True)
    assert not left, "the cluster left processes behind"


def _living(temp_dir: str, patience_s: float = 60.0) -> list[str]:
    """Processes that have this directory in their environment, once they had time to end."""
    deadline_s = time.monotonic() + patience_s
    while True:
        found: list[str] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == temp_dir:
                    found.append(" ".join(process.cmdline()))
        if not found or time.monotonic() > deadline_s:
            return found
        time.sleep(0.2)


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for a condition; fails after a deadline."""

    def wait(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(0.05)

    return wait


@dataclass
class Head:
    """A cluster of its own processes, as `ray start --head` makes it. It is used from subprocesses with `env`."""

    root: Path
    address: str
    dashboard: str
    env: dict[str, str]
    programs: Path = Path(sys.executable).parent

    def start(self, *arguments: str, **env: str) -> None:
        self.env |= env
        host, port = self.address.split(":")
        ports = dict(zip(("dashboard-agent-listen", "ray-client-server"), free_ports(2), strict=True))
        command = ["ray", "start", "--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0"]
        command += [f"--{name}-port={number}" for name, number in ports.items()]
        command += ["--object-store-memory=80000000", f"--dashboard-port={self.dashboard.rsplit(':')[-1]}", *arguments]
        for left in reversed(range(START_TRIES)):
            done = self.call(*command)
            if done.returncode == 0:
                return
            told = done.stdout + done.stderr
            assert SLOW_START in told, told  # Ray gives it 30 s, whatever the machine's load
            assert left > 0, told
            self.stop()

    def call(self, *command: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run one of the programs in `programs`: by default those installed beside this Python."""
        return subprocess.run(
            [self.programs / command[0], *command[1:]],
            env=self.env,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def stop(self) -> None:
        """End every process of this cluster: those with its directory in their environment. `ray stop` ends all Ray."""
        ours = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == self.env["RAY_TMPDIR"]:
                    ours += [process, *process.children(recursive=True)]  # some overwrite their environment
        for process in ours:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(ours, timeout=10)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def head() -> Iterator[Head]:
    """A head node in other processes, without CPUs, not started yet."""
    root = Path(tempfile.mkdtemp(prefix="emoe"))
    (root / "ray").mkdir()
    port, dashboard = free_ports(2)
    host = ray.util.get_node_ip_address()
    dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"RAY_TMPDIR": str(root), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    started = Head(root, f"{host}:{port}", f"http://127.0.0.1:{dashboard}", env)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Command-line overrides of a run that takes no time."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    model = "hidden_size=32 num_layers=2 num_heads=2 num_kv_heads=1 head_dim=16 dense_hidden=32 num_experts=4"
    data = f"corpus={corpus} tokenizer=bytes seq_len=16 global_batch=8 micro_batch=4 val_fraction=0.2"
    run = f"dir={tmp_path / 'run'} steps=4 eval_every_steps=0 eval_sequences=4 sample_tokens=0"
    parts = {
        "model": f"{model} experts_per_token=2 expert_hidden=16",
        "data": data,
        "run": run,
        "tracking": "wandb=off",
    }
    return ["device=cpu", *(f"{part}.{item}" for part, items in parts.items() for item in items.split())]
