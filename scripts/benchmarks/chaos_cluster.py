"""A simulated Ray cluster with one run on it, both in processes of their own, which can be killed, stopped and cut off.

The driver is the program that a user starts. Nothing here talks to the run: processes are found by what the operating
system knows of them, and progress by the run's records.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.run_dir import EVENTS, METRICS

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 80 << 20
WORKER, COORDINATOR, CONTROLLER = "ray::ElasticWorker", "ray::Coordinator", "ray::ElasticController"
STORAGE_TIMEOUT_S = 5.0  # a stalled storage is left behind after so long
ATTEMPTS = 5  # to start a cluster on a busy machine
END_S = 30.0  # for processes that end by themselves
PR_SET_CHILD_SUBREAPER = 36

Json = dict[str, Any]


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent dies, so that none of them is lost from sight."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(name: str = "") -> list[psutil.Process]:
    """Living processes below this one whose title begins with a name."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(name):
                found.append(process)
    return found


def wait_gone(names: tuple[str, ...], patience_s: float = END_S) -> list[str]:
    """Titles of the processes with such names that are still there after some time."""
    deadline_s = time.monotonic() + patience_s
    while True:
        left = [title(process) for name in names for process in descendants(name)]
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(0.2)


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:100]}"
    return str(process.pid)


class ChaosCluster:
    """A head without CPUs, and nodes with one worker each. Use as a context manager.

    Args:
        nodes: nodes to start with.

    Attributes:
        control: control file of the storage's faults. A run that finds none at its start has the plain file system.
        temp: directory of everything that belongs to Ray; the driver's temporary files are in `tmp` below it.
    """

    def __init__(self, nodes: int) -> None:
        self._count = nodes
        self.temp = Path(tempfile.mkdtemp(prefix="emoe"))
        self.control = self.temp / "control"
        for name in ("ray", "tmp"):
            (self.temp / name).mkdir()
        path = [str(Path(__file__).parent / "chaos_hook"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ |= {
            "RAY_TMPDIR": str(self.temp),
            "TMPDIR": str(self.temp / "tmp"),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}",  # the nodes have the package already
            "RAY_worker_niceness": "0",  # Ray gives its workers way to everything else
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.temp / "inductor"),  # torch keeps it for later runs
            "CUDA_VISIBLE_DEVICES": "",
            "CHAOS_STORAGE": str(self.control),
            "CHAOS_STORAGE_TIMEOUT_S": str(STORAGE_TIMEOUT_S),
        }
        self.cluster: Any = None
        self.driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChaosCluster:
        """Start the cluster.

        Raises:
            RuntimeError: Ray did not start a node within its own 30 s, several times.
        """
        failure: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                self._start_nodes()
                return self
            except Exception as error:  # noqa: BLE001 - Ray raises no narrower one on a machine that is too busy
                failure = error
                self._end_nodes()
            except BaseException:
                self.__exit__()
                raise
        self.__exit__()
        raise RuntimeError(f"Ray started no cluster in {ATTEMPTS} attempts: {failure}")

    def _start_nodes(self) -> None:
        from ray.cluster_utils import Cluster  # it reads the environment

        self.cluster = Cluster()
        self.add_node(cpus=0)
        self.restore(self._count)

    def _end_nodes(self) -> None:
        with suppress(Exception):  # what a failed start has left is ended below
            self.cluster.shutdown()
        left = descendants()
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 10)  # else they may write into the directory while it is deleted

    def __exit__(self, *_: object) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        self._end_nodes()
        shutil.rmtree(self.temp, ignore_errors=True)

    def kill_head(self) -> None:
        """Kill what Ray cannot do without: the GCS, a process of the head."""
        send([process for process in descendants() if process.name() == "gcs_server"], signal.SIGKILL)

    def start_again(self) -> None:
        """End what is left of the cluster, and start another one in its place."""
        self._end_nodes()
        self.__enter__()

    # --- the run ------------------------------------------------------------------------------------------------------

    def start(self, overrides: list[str], log: Path) -> None:
        """Start the driver."""
        address = f"cluster.address={self.cluster.address}"
        self.start_module(["elastic_moe.train", "cluster=address", address, *overrides], log)

    def start_module(self, arguments: list[str], log: Path) -> None:
        """Start a driver that is this module with these arguments."""
        command = [sys.executable, "-m", *arguments]
        with log.open("ab") as output:
            self.driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def exit_code(self) -> int | None:
        """The driver's exit code, or None while it runs."""
        return self.driver.poll() if self.driver is not None else None

    # --- nodes --------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Any]:
        """Nodes with a worker's place, the oldest first."""
        return [node for node in self.cluster.list_all_nodes() if node is not self.cluster.head_node]

    def restore(self, count: int) -> None:
        """Bring the number of nodes back to what it was."""
        while len(self.nodes()) > count:
            self.remove_node(self.nodes()[-1])
        while len(self.nodes()) < count:
            self.add_node()

    def try_add_node(self) -> bool:
        """Add a node; False if Ray did not start it in its own 30 s, as happens on a machine that is too busy."""
        try:
            self.add_node()
        except Exception as error:  # noqa: BLE001 - Ray raises no narrower one
            print(f"a node did not start: {error}", file=sys.stderr)
            return False
        return True

    def add_node(self, cpus: int = 1) -> None:
        """Add a node. Ray would have it drain at this process's SIGTERM: that is put back as it was."""
        handler = signal.getsignal(signal.SIGTERM)
        self.cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        signal.signal(signal.SIGTERM, handler)

    def remove_node(self, node: Any) -> None:
        """End a node's processes at once; one that is gone already is left out."""
        if node in self.cluster.worker_nodes:
            self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, deadline_s: float) -> None:
        """Tell Ray that a node will be taken, as a cloud's spot notice does."""
        import ray
        from ray.core.generated import autoscaler_pb2 as pb2

        reason = pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=self.cluster.address)
        client.drain_node(node.node_id, reason, "", int((time.time() + deadline_s) * 1000))

    # --- processes ----------------------------------------------------------------------------------------------------

    def workers(self) -> list[psutil.Process]:
        """The run's workers that Ray has started, the oldest first."""
        return sorted(descendants(WORKER), key=lambda process: process.pid)

    def reset(self, one: list[psutil.Process], other: list[psutil.Process]) -> int:
        """Destroy the TCP connections between two groups of processes. Returns how many there were.

        Both ends are told by a reset, as when a firewall loses its state. It needs root and `ss`.
        """
        here = [(c.laddr.port, c.raddr.port) for p in one for c in _established(p)]
        there = {(c.raddr.port, c.laddr.port) for p in other for c in _established(p)}
        found = [pair for pair in here if pair in there]
        for local, remote in found:
            subprocess.run(["ss", "-K", "sport", "=", str(local), "dport", "=", str(remote)], capture_output=True)
        return len(found)


def _established(process: psutil.Process) -> list[Any]:
    with suppress(psutil.Error):
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    return []


def can_reset() -> bool:
    """Whether connections of other processes can be destroyed here."""
    return os.geteuid() == 0 and shutil.which("ss") is not None


def send(processes: list[psutil.Process], how: signal.Signals) -> list[int]:
    """Send a signal; returns the pids that got it."""
    reached: list[int] = []
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(how)
            reached.append(process.pid)
    return reached


def records(run_dir: Path, name: str = METRICS) -> list[Json]:
    """Whole lines of one of the run's logs."""
    path = run_dir / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def events(run_dir: Path) -> list[Json]:
    return records(run_dir, EVENTS)
