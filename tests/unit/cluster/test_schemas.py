"""Each manifest has the form that its system asks for: Ray's launcher, KubeRay, SkyPilot, a shell, Docker."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.unit.cluster.manifests import CLUSTER, ROOT

AUTOSCALED = ("aws-spot.yaml", "gcp-spot.yaml")
KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml")
SCRIPTS = ("slurm.sh", "start-node.sh")
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_version() -> str:
    (pin,) = (each for each in PROJECT["dependencies"] if each.startswith("ray["))
    return pin.partition("==")[2]


def strictly(node: Any) -> Any:
    """A schema of Kubernetes as strict as its server: a key that is not listed is a fault."""
    if isinstance(node, list):
        return [strictly(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: strictly(value) for key, value in node.items() if key != "format"}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    free = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and isinstance(made.get("properties"), dict) and not free:
        made["additionalProperties"] = False
    return made


def kuberay_form(kind: str) -> dict[str, Any]:
    found = json.loads((ROOT / "tests" / "data" / "kuberay_schemas.json").read_text())
    form = strictly(found["schemas"][kind]) | {"$defs": strictly(found["$defs"])}
    form["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the definition leaves open
    return form


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Specifications of the workers' pods."""
    return [group["template"]["spec"] for group in cluster_spec(manifest)["workerGroupSpecs"]]


@pytest.mark.parametrize("name", AUTOSCALED)
def test_autoscaled_clusters_follow_rays_schema(name: str) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    config = load(name)
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 1}, schema)


@pytest.mark.parametrize("name", AUTOSCALED)
def test_autoscaled_clusters_are_taken_by_rays_launcher(name: str) -> None:
    """As `ray up` begins: defaults are filled in, and types and numbers are checked. No cloud is asked."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(each["max_workers"] for each in types.values()) <= config["max_workers"]
    assert types["on_demand_gpu"]["min_workers"] == types["on_demand_gpu"]["max_workers"] > 0, "the floor"
    assert types["spot_gpu"]["min_workers"] == 0
    asked = json.dumps(types["spot_gpu"]["node_config"])
    assert '"MarketType": "spot"' in asked or '"provisioningModel": "SPOT"' in asked
    assert "spot" not in json.dumps([types["head"], types["on_demand_gpu"]]).lower()
    assert config["docker"]["image"].startswith(f"rayproject/ray:{ray_version()}-py311")
    starts = config["worker_start_ray_commands"]
    assert "ray start --address=$RAY_HEAD_IP:6379" in starts[-2]
    assert "elastic-moe watch-notices" in starts[-1], "after Ray"
    assert "ray start --head" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_follow_kuberays_definitions(name: str) -> None:
    manifest = load(name)
    form = kuberay_form(manifest["kind"])
    jsonschema.validate(manifest, form)
    for break_it in (
        lambda m: pods(m)[0].update(terminationGracePeriodSecond=1),
        lambda m: pods(m)[0]["containers"][0]["lifecycle"]["preStop"].update(exek={}),
        lambda m: cluster_spec(m)["autoscalerOptions"].update(version="v3"),
        lambda m: cluster_spec(m).pop("headGroupSpec"),
    ):
        broken = copy.deepcopy(manifest)
        break_it(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, form)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_the_time_to_hand_over(name: str) -> None:
    manifest = load(name)
    spec = cluster_spec(manifest)
    assert spec["rayVersion"] == ray_version()
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head = spec["headGroupSpec"]["template"]["spec"]
    for pod in (head, *pods(manifest)):
        assert pod["restartPolicy"] == "Never", "which version 2 of the autoscaler needs"
    for pod in pods(manifest):
        (container,) = pod["containers"]
        env = {each["name"]: each["value"] for each in container["env"]}
        hook = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        rays = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert hook + rays < pod["terminationGracePeriodSeconds"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    for template in (spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])):
        port = template["metadata"]["annotations"]["prometheus.io/port"]
        assert int(port) in {each["containerPort"] for each in template["spec"]["containers"][0]["ports"]}


def test_the_cluster_of_the_job_and_the_cluster_alone_differ_in_their_least_numbers_only() -> None:
    specs = [cluster_spec(load(name)) for name in KUBERAY]
    for spec in specs:
        for group in spec["workerGroupSpecs"]:
            del group["replicas"], group["minReplicas"]
    assert specs[0] == specs[1]


def test_the_runs_numbers_fit_the_clusters() -> None:
    manifest = load("kuberay-rayjob.yaml")
    keys = dict(word.split("=", 1) for word in manifest["spec"]["entrypoint"].split() if "=" in word)
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    assert sum(group["minReplicas"] for group in groups) >= int(keys["elastic.min_workers"])
    assert sum(group["maxReplicas"] for group in groups) == int(keys["elastic.max_workers"])
    assert sum(group["replicas"] for group in groups) == int(keys["cluster.workers"])


def test_the_skypilot_task_follows_its_schema() -> None:
    schemas = json.loads((ROOT / "tests" / "data" / "skypilot_schemas.json").read_text())
    task = load("skypilot.yaml")
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    for storage in task["file_mounts"].values():
        jsonschema.validate(storage, schemas["storage"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task["resources"] | {"use_spots": True}, schemas["resources"])
    for port in ("6380", "8266", "52365"):
        assert f"={port}" not in task["run"], "SkyPilot's own Ray is there"
    assert "52366" in task["run"]
    assert "ray stop" not in task["run"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(CLUSTER / name, os.X_OK)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_skypilot_commands_are_bash(part: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=load("skypilot.yaml")[part], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name: str) -> None:
    done = subprocess.run(["shellcheck", CLUSTER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def instructions(name: str) -> list[tuple[str, str]]:
    """Instruction and arguments of a Dockerfile; continued lines are joined, comments are left out."""
    text = "\n".join(line for line in (CLUSTER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_copy_what_is_there_and_run_shell(name: str) -> None:
    made = instructions(name)
    assert {verb for verb, _ in made} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    assert made[0] == ("FROM", "python:3.11-slim-bookworm")
    for verb, rest in made:
        if verb == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
        if verb == "RUN":
            done = subprocess.run(["bash", "-n"], input=rest, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        if verb == "CMD":
            assert json.loads(rest) == ["elastic-moe", "--help"]
    copied = {source for verb, rest in made if verb == "COPY" for source in rest.split()[:-1]}
    assert {PROJECT["readme"], *PROJECT["license-files"], "conf", "elastic_moe", "constraints.txt"} <= copied


@pytest.mark.parametrize("name", ["Dockerfile", *AUTOSCALED])
def test_the_pin_of_torch_is_read_from_the_project(name: str) -> None:
    """The sed command in the manifests finds exactly the pinned requirement."""
    (script,) = set(re.findall(r"sed -n '([^']+)'", (CLUSTER / name).read_text()))
    done = subprocess.run(["sed", "-n", script, ROOT / "pyproject.toml"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in PROJECT["dependencies"]
