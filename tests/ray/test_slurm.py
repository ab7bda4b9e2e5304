"""`cluster/slurm.sh` on an allocation of two nodes: real Ray nodes and a real run, with stand-ins for Slurm's commands.

The stand-in for `srun` starts what it is given on this machine, with a temporary directory and ports of its own for
each node. The one for `scontrol` lists the nodes, and notes what was put back into the queue.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until
from tests.ray.conftest import Head, free_ports

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
SRUN = """#!/bin/bash
node=
while [[ $1 == --* ]]; do
    [[ $1 == --nodelist=* ]] && node=${1#*=}
    shift
done
mkdir -p "$NODES/$node"
[[ $2 == worker ]] && args=("--dashboard-agent-listen-port=$AGENT_PORT")
exec "$@" --temp-dir="$NODES/$node" --num-cpus=1 --object-store-memory=80000000 "${args[@]}"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '%s\\n' $3 ;;
    requeue) echo "$2" >> "$NODES/requeued" ;;
esac
"""


class Allocation:
    """Two nodes of a batch system that does not exist, and the jobs that it starts."""

    def __init__(self, head: Head, tmp_path: Path) -> None:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(0o755)
        self.number = 0
        self.nodes, self._log = head.root, tmp_path / "slurm.out"
        host, agent = ray.util.get_node_ip_address(), free_ports(1)[0]
        path = os.pathsep.join([str(bin_dir), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._env = head.env | {
            "PATH": path, "NODES": str(self.nodes), "AGENT_PORT": str(agent), "SLURM_JOB_NODELIST": f"{host} second",
            "SLURM_SUBMIT_DIR": str(SCRIPT.parents[1]),
        }  # fmt: skip

    def job(self, *overrides: str) -> subprocess.Popen[bytes]:
        """Begin the batch script. The number of the job decides its port, which has to be free."""
        self.number = next(number for number in range(secrets.randbelow(9000), 10000) if _is_free(20000 + number))
        env = self._env | {"SLURM_JOB_ID": str(self.number)}
        with open(self._log, "ab") as log:
            return subprocess.Popen([SCRIPT, *overrides], env=env, stdout=log, stderr=log, start_new_session=True)

    def told(self) -> str:
        return self._log.read_text()

    def left(self) -> list[psutil.Process]:
        """Processes of the nodes' Ray that live."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.nodes) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def _is_free(port: int) -> bool:
    return all(connection.laddr.port != port for connection in psutil.net_connections("tcp") if connection.laddr)


@pytest.fixture
def allocation(head: Head, tmp_path: Path) -> Iterator[Allocation]:
    made = Allocation(head, tmp_path)
    try:
        yield made
    finally:
        left = made.left()
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)


@pytest.mark.timeout(900)
@pytest.mark.long
def test_a_job_runs_on_all_nodes_is_stopped_before_its_limit_and_goes_on(
    allocation: Allocation, tiny: list[str], tmp_path: Path
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def steps_of_both() -> int:
        assert job.poll() is None, allocation.told()
        records = list(read_jsonl(metrics)) if metrics.exists() else []
        return sum(record["world_size"] == 2 for record in records)

    job = allocation.job(*tiny, "run.steps=1000000")
    try:
        until(lambda: steps_of_both() >= 5, "steps on both nodes", 400.0)
        job.send_signal(signal.SIGTERM)  # what --signal=B:TERM@180 sends
        assert job.wait(240) == 143, allocation.told()
    finally:
        job.kill()
        job.wait()
    assert "stopped with its state saved" in allocation.told()
    assert (allocation.nodes / "requeued").read_text().split() == [str(allocation.number)]
    until(lambda: not allocation.left(), "the end of all nodes")

    stopped = [int(record["step"]) for record in read_jsonl(metrics)][-1]
    again = allocation.job(*tiny, f"run.steps={stopped + 3}")
    try:
        assert again.wait(400) == 0, allocation.told()
    finally:
        again.kill()
        again.wait()
    assert [record["step"] for record in read_jsonl(metrics)] == list(range(1, stopped + 4))
    until(lambda: not allocation.left(), "the end of all nodes")
