"""A node that its cloud takes, and a node that is sent SIGTERM, are left by a planned view: no step is made again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.metadata_server import metadata_server
from tests.patience import until
from tests.ray.blocking import BlockingNode, RunOnNodes, run_on, start_node
from tests.ray.conftest import Head

WORKERS = 3
ENDS_S = 240.0


def start_nodes(head: Head) -> list[BlockingNode]:
    head.start("--include-dashboard=false")
    return [start_node(head, f"node{i}", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="60") for i in range(WORKERS)]


def assert_left_as_planned(run: RunOnNodes) -> None:
    """One worker has handed over and ended; no collective broke, so not even a step in flight was made again."""
    (worker,) = {event["worker"] for event in run.events("drain")}
    assert worker in {event["worker"] for event in run.events("worker_left")}
    for kind in ("worker_lost", "worker_evicted", "suspect", "rolled_back"):
        assert not run.events(kind), kind
    assert all(view["planned"] for view in run.events("view")[1:])


@pytest.mark.timeout(900)
def test_a_notice_of_the_cloud_is_a_planned_leave(head: Any, tiny: list[str], tmp_path: Path) -> None:
    nodes = start_nodes(head)
    leaving = nodes[0].node()
    assert leaving is not None
    with metadata_server("aws") as cloud, run_on(head, tiny, tmp_path, WORKERS) as run:
        command = [sys.executable, "-m", "elastic_moe", "watch-notices", f"--endpoint={cloud.url}"]
        command += [f"--address={head.address}", f"--node-id={leaving.node_id}", "--every=1"]
        watcher = subprocess.Popen(command, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            run.wait_size(WORKERS)
            assert watcher.poll() is None
            cloud.give_notice(110.0)
            told, _ = watcher.communicate(timeout=ENDS_S)
            assert watcher.returncode == 0, told
            assert "this is a machine of aws" in told
            assert told.count("is draining") == 1, told
            run.wait_size(WORKERS - 1)
        finally:
            watcher.kill()
            watcher.wait()
        until(lambda: nodes[0].node() is None, "the end of the raylet that nobody uses", ENDS_S)
        run.wait_size(WORKERS - 1)
        assert_left_as_planned(run)
        run.finish()
    hooked = nodes[1].node()
    assert hooked is not None
    hook = [sys.executable, "-m", "elastic_moe", "watch-notices", "--now=60"]  # what the preStop hook of a pod calls
    hook += [f"--address={head.address}", f"--node-id={hooked.node_id}"]
    done = subprocess.run(hook, env=head.env, capture_output=True, text=True, timeout=ENDS_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("Ray has ended on this machine\n")
    assert nodes[1].node() is None


@pytest.mark.timeout(900)
def test_sigterm_to_ray_start_block_is_a_planned_leave(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """What a deleted pod, a stopped container and a batch system send. Ray drains its node before it ends."""
    nodes = start_nodes(head)
    with run_on(head, tiny, tmp_path, WORKERS) as run:
        run.wait_size(WORKERS)
        nodes[0].process.send_signal(signal.SIGTERM)
        run.wait_size(WORKERS - 1)
        nodes[0].process.wait(ENDS_S)
        told = nodes[0].log.read_text()
        assert "did not finish draining" not in told, "the node waits for our workers, and they go in time"
        run.wait_size(WORKERS - 1)
        assert_left_as_planned(run)
        run.finish()
