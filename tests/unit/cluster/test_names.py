"""Every name in a manifest and in its guide exists: subcommands, options, configuration keys, variables, files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import ray

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.main import SUBCOMMANDS
from elastic_moe.cli.watch_notices import ENDPOINT
from elastic_moe.sweep.register import register
from tests.unit.cluster.manifests import CLUSTER, FILES, ROOT, command_lines, own_variables, variables

RAY = Path(ray.__file__).parent
SLURM = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR"}  # sbatch(1), output environment variables
SKYPILOT = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_TASK_ID"}  # its documentation
OTHERS = {  # read by the libraries that are named
    "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES", "SECONDS", "PWD", "HOME", "PATH",
}  # fmt: skip
IDS = [path.name for path in FILES]


def ray_reads(name: str) -> bool:
    """Whether the installed Ray has this variable: in its Python sources, or in its C++ core (flags as RAY_name)."""
    flag = name.removeprefix("RAY_")
    if (flag if flag.islower() else name).encode() in (RAY / "_raylet.so").read_bytes():
        return True
    parts = (
        RAY / "_private",
        RAY / "autoscaler",
        RAY / "dashboard" / "modules" / "job",
        RAY / "scripts",
        RAY / "train",
    )
    sources = (path for part in parts for path in sorted(part.rglob("*.py")))
    return any(re.search(rf"\b{name}\b", path.read_text()) for path in sources)


def test_all_kinds_of_manifests_are_there() -> None:
    expected = {"aws-spot.yaml", "gcp-spot.yaml", "kuberay-raycluster.yaml", "kuberay-rayjob.yaml", "skypilot.yaml"}
    expected |= {"slurm.sh", "start-node.sh", "Dockerfile", "Dockerfile.cuda", "README.md"}
    assert expected <= set(IDS)


def test_every_file_is_in_the_guide() -> None:
    guide = (CLUSTER / "README.md").read_text()
    assert [name for name in IDS if name != "README.md" and name not in guide] == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_variables_exist(path: Path) -> None:
    text = path.read_text()
    unknown = variables(text) - own_variables(text) - SLURM - SKYPILOT - OTHERS - {ENDPOINT}
    assert [name for name in sorted(unknown) if not (name.startswith("RAY_") and ray_reads(name))] == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_subcommands_options_and_keys_exist(path: Path) -> None:
    for subcommand, *words in command_lines(path):
        assert subcommand in SUBCOMMANDS, f"{path.name}: {subcommand}"
        if subcommand == "train":
            _assert_keys(words)
        elif subcommand in ("watch-notices", "ctl", "status"):
            module = importlib.import_module(f"elastic_moe.cli.{subcommand.replace('-', '_')}")
            parser = getattr(module, "_parser", None)
            known = parser().format_help() if parser else Path(str(module.__file__)).read_text()
            for word in words:
                if word.startswith("--"):
                    assert word.partition("=")[0] in known, f"{path.name}: {subcommand} {word}"
            if parser:
                parser().parse_args(words)


def test_there_are_commands_to_check() -> None:
    told = {path.name: command_lines(path) for path in FILES}
    assert ["watch-notices", "--provider", "aws"] in told["aws-spot.yaml"]
    assert ["watch-notices", "--now", "60"] in told["kuberay-rayjob.yaml"]
    assert any("run.resume=auto" in words for words in told["kuberay-rayjob.yaml"])
    assert any("cluster.gpus_per_worker=1" in words for words in told["skypilot.yaml"])
    assert len(told["README.md"]) > 8


@pytest.mark.parametrize("wrong", ["elastic.min_worker=2", "elastic.max_workers=x", "model=gigantic"])
def test_a_wrong_key_or_value_is_found(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"min_worker|max_workers|gigantic"):
        _assert_keys(["cluster.workers=2", wrong])


def _assert_keys(words: list[str]) -> None:
    """Compose the configuration as the command would. A value of the shell's is a number or a text."""
    register_schema()
    register()
    overrides: list[str] = []
    for word in words:
        assert re.fullmatch(r"-m|[a-z_./]+=.+", word), word
        key, _, value = word.partition("=")
        if "$" in value:
            value = "4" if key == "cluster.workers" else re.sub(r"\$(\{[^}]*\}|\w+)", "x", value)
        if key == "run.dir":
            value = "/tmp/run"
        overrides += [f"{key}={value}"] if value else []
    check(overrides, multirun="-m" in words)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".md"], ids=lambda path: path.name)
def test_files_of_the_checkout_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"\bcluster/[\w.-]*\w", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: {name}"
