"""An autoscaler brings nodes because the trainer's missing workers are demand, and the run grows onto them.

Ray's own `AutoscalingCluster` calls `ray stop`, which ends every Ray on the machine. So this test configures the fake
nodes itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from elastic_moe.metrics.jsonl import read_jsonl

FEW, MANY = 2, 4


def _cluster(address: str) -> dict[str, Any]:
    """A head that computes nothing, and fake nodes of one CPU: FEW of them always, up to MANY on demand."""
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    node = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    return {name: [] for name in lists} | {
        "auth": {},
        "file_mounts": {},
        "cluster_name": "fake",
        "max_workers": MANY,
        "idle_timeout_minutes": 5,
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
            "worker": node | {"min_workers": FEW, "max_workers": MANY},
        },
        "head_node_type": "ray.head.default",
    }


@pytest.mark.timeout(900)
def test_a_run_grows_onto_nodes_that_its_demand_brings(
    head: Any, tiny: list[str], tmp_path: Path, until: Callable[..., None]
) -> None:
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(_cluster(head.address)))
    head.start(
        f"--autoscaling-config={config}",
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
    )

    def status() -> str:
        return head.call("ray", "status", f"--address={head.address}").stdout

    until(lambda: f"/{FEW}.0 CPU" in status(), f"{FEW} nodes", 240.0)
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

            until(grown, f"a step with {MANY} workers", 240.0)
            until(lambda: f"/{MANY}.0 CPU" in status(), f"{MANY} nodes", 240.0)
            run.send_signal(signal.SIGINT)
            assert run.wait(240) == 128 + signal.SIGINT, (tmp_path / "output").read_text()
        finally:
            run.kill()
            run.wait()
    sizes = _sizes(metrics)
    assert sizes[0] == FEW
    assert sizes == sorted(sizes), "the run only grows"


def _sizes(metrics: Path) -> list[int]:
    return [int(record["world_size"]) for record in read_jsonl(metrics)]
