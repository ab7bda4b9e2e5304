"""Ray's token authentication: an embedded Ray leaves no token behind, and a cluster that wants one gets it.

On such a cluster the program is what users install: a wheel, without a checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.actors.cluster import SLOW_START
from elastic_moe.metrics.jsonl import read_jsonl
from tests.ray.conftest import START_TRIES

ROOT = Path(__file__).resolve().parents[2]
LOCAL = """
import os, subprocess, sys
from pathlib import Path
import ray
from elastic_moe.actors.cluster import ray_session
from elastic_moe.actors.operate import announced
from elastic_moe.config.schema import ClusterConfig, TrainConfig

def process():
    return os.getpid()

run = Path(sys.argv[1])
before = dict(os.environ)
for _ in range(2):
    with ray_session(TrainConfig(cluster=ClusterConfig(kind="local", workers=1, object_store_gib=0.08))):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert ray.get(ray.remote(num_cpus=1)(process).remote()) != os.getpid(), "a task runs"
        with announced(run):
            command = [sys.executable, "-m", "elastic_moe", "status", str(run)]
            other = subprocess.run(command, env=before, capture_output=True, text=True)
            assert "goes on in the Ray cluster at" in other.stderr, other.stderr
            stranger = before | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
            other = subprocess.run(command, env=stranger, capture_output=True, text=True)
            assert "or it wants another token" in other.stderr, other.stderr
    assert not [name for name in os.environ if name.startswith("RAY_AUTH")]
print("both ran")
"""


def without_token(root: Path) -> dict[str, str]:
    """The environment of a user with a new home directory, who has decided nothing about tokens."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    (root / "home").mkdir()
    return env | {"HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_an_embedded_ray_has_a_token_that_ends_with_it(tmp_path: Path) -> None:
    """`ray.init` alone would leave one in the home directory, and so turn authentication on for every `ray start`."""
    run = tmp_path / "run"
    run.mkdir()
    env = without_token(tmp_path)
    command = [sys.executable, "-c", LOCAL, str(run)]
    for left in reversed(range(START_TRIES)):
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        if not left or SLOW_START not in done.stderr:  # Ray gives it 30 s, however crowded it is
            break
    assert done.stdout == "both ran\n", done.stdout + done.stderr
    assert not (tmp_path / "home" / ".ray").exists()


def install(directory: Path) -> Path:
    """Build the wheel and install it into a new environment, which takes all else from this one. Returns its programs.

    The packages of this environment come after its own, so that the wheel is what is imported.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = directory / "wheels"
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", ROOT], check=True
    )
    (wheel,) = wheels.glob("elastic_moe-*.whl")
    venv.create(directory / "venv", with_pip=False)
    python = directory / "venv" / "bin" / "python"
    subprocess.run([*pip, f"--python={python}", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (found,) = (directory / "venv" / "lib").glob("python*/site-packages")
    (found / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    ray = python.with_name("ray")
    ray.write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    return python.parent


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_installed_wheel_runs_on_a_cluster_with_a_token(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """The job is submitted from an empty directory, without a working directory, with a runtime environment."""
    head.programs = install(tmp_path)
    head.env = {name: value for name, value in head.env.items() if name not in ("PYTHONPATH", "RAY_AUTH_MODE")}
    stranger = without_token(tmp_path) | {"RAY_TMPDIR": head.env["RAY_TMPDIR"]}
    path = f"{head.programs}{os.pathsep}{head.env['PATH']}"
    head.env |= {"HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "token", "PATH": path}
    made = head.call("ray", "get-auth-token", "--generate")
    assert made.returncode == 0, made.stderr
    head.start("--num-cpus=2", "--include-dashboard=true")

    python, run = head.programs / "python", tmp_path / "run"
    env_vars = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "OMP_NUM_THREADS": "1"}}
    submit = ["ray", "job", "submit", f"--address={head.dashboard}", f"--runtime-env-json={json.dumps(env_vars)}"]
    done = head.call(*submit, "--", "elastic-moe", "train", "cluster.workers=2", *tiny, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps, loss" in done.stdout
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
    where = subprocess.run(
        [python, "-c", "import elastic_moe; print(elastic_moe.__file__)"],
        env=head.env, cwd=head.root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path / "venv")), "the wheel is what ran"

    os.remove(tmp_path / "home" / ".ray" / "auth_token")
    command = [sys.executable, "-m", "elastic_moe", "train", f"cluster.address={head.address}", *tiny]
    for mode in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = subprocess.run(
            [*command, f"run.dir={tmp_path}/no"], env=stranger | mode, cwd=tmp_path, capture_output=True, text=True
        )
        assert refused.returncode == 2, (mode, refused.stdout + refused.stderr)
        assert f"no Ray cluster answers at {head.address}, or it wants another token" in refused.stderr
