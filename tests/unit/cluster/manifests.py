"""Reads the manifests in `cluster/`: their texts, the names in them, and the command lines that they call."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
CALL = re.compile(
    r"(?:^|[\s;`(])(?:(elastic-moe)[ \t]+(?=[a-z][a-z-]*(?:[ \t]|$))|python -m elastic_moe\.train[ \t]+(?=[a-z]))"
)
PROSE = ("have", "and", "is", "needs", "shows")  # words that follow the program's name in a sentence


def variables(text: str) -> set[str]:
    """Names of environment variables that a text reads or sets for others."""
    read = re.findall(r"\$\{?([A-Z][A-Za-z0-9_]*)", text)
    named = re.findall(r"\b((?:RAY|SLURM|SKYPILOT|ELASTIC_MOE|NCCL|NVIDIA|AWS)_[A-Za-z0-9_]+)\b", text)
    return set(read) | set(named)


def own_variables(text: str) -> set[str]:
    """Names that a shell script gives a value, and that mean nothing outside of it."""
    given = set(re.findall(r"^\s*([A-Z][A-Z0-9_]*)=", text, re.MULTILINE))
    return {name for name in given if not name.startswith(("RAY_", "SLURM_", "SKYPILOT_", "ELASTIC_MOE_"))}


def yaml_strings(node: Any) -> Iterator[str]:
    """All texts in a YAML document; a list of words that begins with this program is one text."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from yaml_strings(value)
    elif isinstance(node, list):
        if node[:1] == ["elastic-moe"]:
            yield shlex.join(str(word) for word in node)
        for value in node:
            yield from yaml_strings(value)


def command_lines(path: Path) -> list[list[str]]:
    """Every call of this program in a file, comments included: its words from the subcommand on."""
    text = path.read_text()
    texts = [text]
    if path.suffix == ".yaml":
        comments = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
        texts = [comments, *yaml_strings(yaml.safe_load(text))]
    found: list[list[str]] = []
    for part in texts:
        for line in re.sub(r"\\\n#?\s*", " ", part).splitlines():
            for match in CALL.finditer(line):
                rest = re.split(r"[;|&`<>]|\s#\s| {3,}#|\.\.\.", line[match.end() :])[0]
                words = rest.replace('"$@"', "").split() if "'" in rest else shlex.split(rest.replace('"$@"', ""))
                words = words if match[1] else ["train", *words]
                if words and words[0] not in PROSE:
                    found.append(words)
    return found
