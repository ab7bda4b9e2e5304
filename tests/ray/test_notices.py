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
CLOUDS = ("aws", "gcp", "azure")
ENDS_S = 240.0


def start_nodes(head: Head, count: int) -> list[BlockingNode]:
    head.start("--include-dashboard=false")
    return [start_node(head, f"node{i}", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="60") for i in range(count)]


def id_of(node: BlockingNode) -> str:
    found = node.node()
    assert found is not None
    return found.node_id


def assert_left_as_planned(run: RunOnNodes, nodes: int) -> None:
    """One worker of each has handed over and ended; no collective broke: not even a step in flight was made again."""
    drained = {event["worker"] for event in run.events("drain")}
    assert len(drained) == nodes
    assert drained <= {event["worker"] for event in run.events("worker_left")}
    for kind in ("worker_lost", "worker_evicted", "suspect", "rolled_back"):
        assert not run.events(kind), kind
    assert all(view["planned"] for view in run.events("view")[1:])


def take(provider: str, node: BlockingNode, head: Head, run: RunOnNodes, left: int) -> None:
    """A cloud that says it will take this node; `left`: workers that then remain."""
    with metadata_server(provider) as cloud:
        command = [sys.executable, "-m", "elastic_moe", "watch-notices", f"--endpoint={cloud.url}"]
        command += [f"--address={head.address}", f"--node-id={id_of(node)}", "--every=1"]
        watcher = subprocess.Popen(command, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            run.wait_size(left + 1)
            assert watcher.poll() is None
            cloud.give_notice(110.0)
            told, _ = watcher.communicate(timeout=ENDS_S)
            assert watcher.returncode == 0, told
            assert f"this is a machine of {provider}" in told
            assert told.count("is draining") == 1, told
            run.wait_size(left)
        finally:
            watcher.kill()
            watcher.wait()
    until(lambda: node.node() is None, "the end of the raylet that nobody uses", ENDS_S)
    run.wait_size(left)


@pytest.mark.timeout(900)
def test_a_notice_of_each_cloud_is_a_planned_leave(head: Any, tiny: list[str], tmp_path: Path) -> None:
    *taken, hooked = start_nodes(head, len(CLOUDS) + 1)
    with run_on(head, tiny, tmp_path, len(CLOUDS) + 1) as run:
        for left, provider, node in zip((3, 2, 1), CLOUDS, taken, strict=True):
            take(provider, node, head, run, left)
        assert_left_as_planned(run, len(CLOUDS))
        run.finish()
    hook = [sys.executable, "-m", "elastic_moe", "watch-notices", "--now=60"]  # what the preStop hook of a pod calls
    hook += [f"--address={head.address}", f"--node-id={id_of(hooked)}"]
    done = subprocess.run(hook, env=head.env, capture_output=True, text=True, timeout=ENDS_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("Ray has ended on this machine\n")
    assert hooked.node() is None


@pytest.mark.timeout(900)
def test_sigterm_to_ray_start_block_is_a_planned_leave(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """What a deleted pod, a stopped container and a batch system send. Ray drains its node before it ends."""
    nodes = start_nodes(head, WORKERS)
    with run_on(head, tiny, tmp_path, WORKERS) as run:
        run.wait_size(WORKERS)
        nodes[0].process.send_signal(signal.SIGTERM)
        run.wait_size(WORKERS - 1)
        nodes[0].process.wait(ENDS_S)
        told = nodes[0].log.read_text()
        assert "did not finish draining" not in told, "the node waits for our workers, and they go in time"
        run.wait_size(WORKERS - 1)
        assert_left_as_planned(run, 1)
        run.finish()
