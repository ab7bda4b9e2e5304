"""Ray's autoscaler, of both versions, brings nodes because missing workers are demand, and takes idle ones away again.

The run grows onto spot nodes beside a floor of nodes that stay, gives them up when it is told to shrink, gets others
when it may grow, and leaves none busy when it ends. Which nodes its first workers got does not matter.

Ray's own `AutoscalingCluster` calls `ray stop`, which ends every Ray on the machine. So this test configures the fake
nodes itself.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from elastic_moe.metrics.jsonl import read_jsonl

FEW, MANY = 2, 4
MARKET = "ray.io/market-type"
IDLE_S = 15
PATIENCE_S = 240.0


def _cluster(address: str) -> dict[str, Any]:
    """A head that computes nothing, and fake nodes of one CPU: FEW of them always, up to MANY with spot nodes."""
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    node = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    return {name: [] for name in lists} | {
        "auth": {},
        "file_mounts": {},
        "cluster_name": "fake",
        "max_workers": MANY,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",  # "fake_multinode" needs a file that Ray's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "floor": node | {"min_workers": FEW, "max_workers": FEW, "labels": {MARKET: "on-demand"}},
            "spot": node | {"min_workers": 0, "max_workers": MANY - FEW, "labels": {MARKET: "spot"}},
        },
        "head_node_type": "ray.head.default",
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.long), 2])
def test_nodes_come_for_a_runs_demand_and_go_when_it_needs_them_no_more(
    head: Any, tiny: list[str], tmp_path: Path, until: Callable[..., None], version: int
) -> None:
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(_cluster(head.address)))
    head.start(
        f"--autoscaling-config={config}",
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_enable_autoscaler_v2=str(version - 1),
        RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
    )

    def status() -> str:
        return head.call("ray", "status", f"--address={head.address}").stdout

    def nodes() -> int:
        """Nodes of one CPU that live."""
        found = re.search(r"/(\d+)\.0 CPU", status())
        return int(found[1]) if found else 0

    def scale(workers: int) -> None:
        """Steer the run, and wait until it has so many workers."""
        program = [sys.executable, "-m", "elastic_moe", "ctl", str(tmp_path / "run"), "--wait", str(PATIENCE_S)]
        done = subprocess.run(
            [*program, "scale", str(workers)], env=head.env, cwd=head.root, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr

    until(lambda: nodes() == FEW, f"{FEW} nodes", PATIENCE_S)
    assert "(no resource demands)" in status()
    where = ["cluster=address", f"cluster.address={head.address}", f"cluster.workers={FEW}"]
    size = [f"elastic.min_workers={FEW}", f"elastic.max_workers={MANY}", "run.steps=100000"]
    command = [sys.executable, "-m", "elastic_moe.train", *tiny, *where, *size]
    with open(tmp_path / "output", "w+") as output:
        run = subprocess.Popen(command, env=head.env, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            until(lambda: "pending placement groups" in status(), "demand for more workers", 240.0)

            def grown() -> bool:
                assert run.poll() is None, (tmp_path / "output").read_text()
                return metrics.exists() and read_jsonl(metrics)[-1:] != [] and _sizes(metrics)[-1] == MANY

            until(grown, f"a step with {MANY} workers", PATIENCE_S)
            until(lambda: nodes() == MANY, f"{MANY} nodes", PATIENCE_S)
            scale(FEW)
            until(lambda: nodes() == FEW, "the end of nodes that are idle", PATIENCE_S)
            assert "pending placement groups" not in status(), "no demand is left for workers that shall not be"
            scale(MANY)
            assert nodes() == MANY
            run.send_signal(signal.SIGINT)
            assert run.wait(240) == 128 + signal.SIGINT, (tmp_path / "output").read_text()
            until(lambda: nodes() == FEW, "the end of nodes that no run uses", PATIENCE_S)
            assert "(no resource demands)" in status()
        finally:
            run.kill()
            run.wait()
    sizes = _sizes(metrics)
    turns = [size for size, _ in groupby(sizes)]
    lowest = len(turns) - turns[::-1].index(FEW) - 1  # where it has shrunk
    highest = turns.index(MANY)
    assert turns[0] == FEW
    assert turns[: highest + 1] == sorted(turns[: highest + 1]), "it grows"
    assert turns[highest : lowest + 1] == sorted(turns[highest : lowest + 1], reverse=True), "it shrinks"
    assert turns[lowest:] == sorted(turns[lowest:]), "it grows again"
    assert turns[-1] == MANY
    assert [record["step"] for record in read_jsonl(metrics)] == list(range(1, len(sizes) + 1))
    entered = [event for event in read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "entered"]
    assert all(event["lost_steps"] == 0 for event in entered)


def _sizes(metrics: Path) -> list[int]:
    return [int(record["world_size"]) for record in read_jsonl(metrics)]
