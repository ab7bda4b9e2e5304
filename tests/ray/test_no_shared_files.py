"""A run on three nodes that share no file system, with a kill, a join, a stop and a resume; with and without S3.

Each node is a `ray start --block` in a mount namespace of its own, in which empty directories hide the run directory,
the corpus, Ray's files and the user's copies. Skipped where this process may not mount.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.runtime.places import copies_dir
from tests.patience import until
from tests.ray.blocking import BlockingNode, start_node
from tests.ray.test_stop import ENDLESS, PATIENCE_S, wait_steps
from tests.s3_server import BUCKET, CREDENTIALS, s3_server

MOUNT = "mount --make-rprivate / && for d in {hidden}; do mkdir -p $d && mount -t tmpfs none $d; done && exec {command}"


def apart(command: list[str], *hidden: Path) -> list[str]:
    """A command that runs in a mount namespace of its own, with empty directories in the place of these."""
    directories = " ".join(shlex.quote(str(path)) for path in hidden)
    return ["unshare", "--mount", "bash", "-c", MOUNT.format(hidden=directories, command=shlex.join(command))]


@pytest.fixture
def add_node(head: Any, tmp_path: Path) -> Callable[[], BlockingNode]:
    """Starts a node of one CPU that shares no files."""
    if subprocess.run(apart(["true"], tmp_path / "try"), capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    names = (f"node{number}" for number in itertools.count())
    hidden = (tmp_path, head.root / "ray", copies_dir())
    return lambda: start_node(head, next(names), lambda command: apart(command, *hidden))


@pytest.fixture
def bucket(head: Any, tmp_path: Path) -> Iterator[str]:
    """A place in an object store that the cluster knows."""
    with s3_server(tmp_path) as port:
        head.env |= CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        yield f"s3://{BUCKET}/run"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("store", ["the coordinator's node", pytest.param("S3", marks=pytest.mark.long)])
def test_nodes_that_share_no_files_train_lose_no_step_and_resume(
    head: Any, tiny: list[str], tmp_path: Path, bucket: str, add_node: Callable[[], Any], store: str
) -> None:
    head.start()
    for _ in range(3):
        add_node()
    run = tmp_path / "run"
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", f"cluster.address={head.address}", *tiny]
    train += ["cluster.workers=3", "elastic.max_workers=4", "checkpoint.every_steps=10", "run.resume=auto"]
    train += [f"checkpoint.dir={bucket}"] if store == "S3" else []
    lacking = "does not see the corpus" if store == "S3" else "does not see checkpoint.dir and the corpus"
    env = head.env | {"OMP_NUM_THREADS": "1"}

    def served() -> list[dict[str, Any]]:
        return [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "files_served"]

    def members() -> int:
        return int(read_jsonl(run / "metrics.jsonl")[-1]["world_size"])

    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen([*train, ENDLESS], env=env, stdout=log, stderr=log)
    try:
        wait_steps(run, 12, lambda: driver.poll() is None)
        until(lambda: members() == 3, "three members", PATIENCE_S)
        connected = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "worker_connected"]
        os.kill(connected[0]["pid"], signal.SIGKILL)
        add_node()
        until(lambda: len(served()) >= 5 and members() == 4, "the replacement and the joiner", PATIENCE_S)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(PATIENCE_S) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    finally:
        driver.kill()
        driver.wait()
    events, steps = read_jsonl(run / "events.jsonl"), [r["step"] for r in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost, and none is done twice"
    assert all(lacking in event["reason"] for event in served())
    assert not [event for event in events if event["event"] == "checkpoint_failed"]
    assert max(event["step"] for event in events if event["event"] == "checkpoint") == steps[-1]
    assert (run / "checkpoints").exists() == (store != "S3")

    again = subprocess.run(
        [*train, f"run.steps={len(steps) + 5}"], env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    resumed = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "entered" and e["source"] == "checkpoint"]
    assert [(e["step"], e["lost_steps"]) for e in resumed] == [(len(steps) - 5, 0)]
