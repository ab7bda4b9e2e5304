"""The reference of all configuration keys, made from the schema and the rules: conf/README.md and `--help`.

`python -m elastic_moe.config.reference` prints conf/README.md. A key's comment stands beside its field in schema.py.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from elastic_moe.config import schema
from elastic_moe.config.build import key_names
from elastic_moe.config.renamed import RENAMED_KEYS, RENAMED_VALUES
from elastic_moe.config.rules import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO, CHOICES

GROUP_FILES = ("model", "cluster")  # groups of keys with ready-made options in conf/


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: with its group, such as `run.steps`.
        default: as one writes it on the command line.
        allowed: its values or range; empty for a text or a truth value.
        comment: its meaning.
    """

    name: str
    default: str
    allowed: str
    comment: str

    @property
    def group(self) -> str:
        return self.name.rpartition(".")[0]


def config_dir() -> Path:
    """The directory of the YAML files: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """The options of a group in conf/, sorted."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def keys() -> list[Key]:
    """Every key in the order of the schema, those without a group first."""
    comments, root = _comments(), schema.TrainConfig()
    found: list[Key] = []
    for name in key_names():
        owner: object = root
        *groups, field = name.split(".")
        for group in groups:
            owner = getattr(owner, group)
        value = getattr(owner, field)
        if not isinstance(value, schema.Sealed):
            found.append(Key(name, _written(value), _allowed(name), comments[type(owner).__name__, field]))
    return sorted(found, key=lambda key: bool(key.group))


def help_text(title: str, usage: str, width: int) -> str:
    """The help of a command that takes configuration keys, in lines of at most `width` characters."""
    lines = [f"usage: {usage}", "", *textwrap.wrap(title, width), "", "Groups of keys with options, NAME=OPTION:"]
    for group in GROUP_FILES:
        lines += _hanging(f"  {group}=", ", ".join(options(group)), width)
    group = None
    for key in keys():
        if key.group != group:
            group = key.group
            lines += ["", f"{group}:" if group else "Keys, NAME=VALUE (the default is shown):"]
        lines.append(f"  {key.name}={key.default}")
        described = f"{key.comment} [{key.allowed}]" if key.allowed else key.comment
        lines += _hanging("      ", described, width)
    flags = "Hydra's own flags: --cfg job shows the composed configuration, -m runs a sweep, --hydra-help lists all."
    lines += ["", *textwrap.wrap(flags, width)]
    return "\n".join(lines)


def markdown() -> str:
    """The text of conf/README.md."""
    lines = [
        "# Configuration keys",
        "",
        "This page is made from `elastic_moe/config/schema.py` by `python -m elastic_moe.config.reference`.",
        "Any key can be set on the command line: `elastic-moe train model=small cluster=simulated run.steps=500`.",
        "A key of a model preset or cluster preset overrides the default below.",
        "",
        "| group | options |",
        "|---|---|",
        *(f"| `{group}=` | {', '.join(f'`{name}`' for name in options(group))} |" for group in GROUP_FILES),
    ]
    group = None
    for key in keys():
        if key.group != group:
            group = key.group
            lines += ["", f"## {group or 'Keys without a group'}", "", "| key | default | allowed | meaning |"]
            lines.append("|---|---|---|---|")
        default = f"`{key.default}`"
        lines.append(f"| `{key.name}` | {default} | {key.allowed} | {key.comment} |")
    lines += [
        "",
        "## Renamed keys",
        "",
        "An old key given by a user is refused with a sentence that names the new one.",
    ]
    lines += ["A `config.yaml` of an old run is read with this table.", "", "| old | new |", "|---|---|"]
    lines += [f"| `{old}` | `{new.name}`{new.note} |" for old, new in RENAMED_KEYS.items()]
    lines += [f"| `{key}={old}` | `{key}={new}` |" for (key, old), new in RENAMED_VALUES.items()]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'" if value != value.strip() or not value else value
    if isinstance(value, dict):
        items = cast("dict[str, float]", value).items()
        return "{" + ",".join(f"{name}:{one}" for name, one in items) + "}"
    return str(value)


def _allowed(name: str) -> str:
    if name in CHOICES:
        return ", ".join(CHOICES[name])
    if name == "cluster.price_per_hour":
        return "at least 0 each; 0: not known"
    if name == "data.mixture":
        return "above 0 each"
    ranges = ((AT_LEAST_ONE, "at least 1"), (AT_LEAST_ZERO, "at least 0"), (ABOVE_ZERO, "above 0"))
    return next((text for names, text in ranges if name in names), "")


def _hanging(start: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start))


def _comments() -> dict[tuple[str, str], str]:
    """The comment beside each field of schema.py, by class and field."""
    source = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    of_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {(owner, field): of_line.get(line, "") for owner, field, line in _fields(source)}


def _fields(source: str) -> Iterator[tuple[str, str, int]]:
    """Class, name and last line of every annotated field."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield node.name, field.target.id, field.end_lineno or field.lineno


if __name__ == "__main__":
    print(markdown(), end="")
