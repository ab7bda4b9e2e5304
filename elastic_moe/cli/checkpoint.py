"""Checkpoints on disk: `elastic-moe checkpoint list|verify|diff|prune|rewind DIR`.

DIR is a run directory, a checkpoint root (a URI too), or for `diff` two checkpoints. `prune` removes unfinished and
abandoned checkpoints. `rewind` takes a run back to an earlier one, for `run.resume=auto` to go on from there: not a key
of the start, because a start that is made again must not go back again. Without `--yes` both only tell what they would
do, and they never work on a directory that a run owns now.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_moe.checkpoint.identity import RunIdentity
from elastic_moe.checkpoint.inventory import ABANDONED, COMPLETE, DAMAGED, UNFINISHED, differences, list_checkpoints
from elastic_moe.checkpoint.reader import load_manifest
from elastic_moe.checkpoint.writer import remove
from elastic_moe.config.saved import read_config
from elastic_moe.coordination.lease import Lease
from elastic_moe.coordination.rewind import rewind
from elastic_moe.errors import UserError
from elastic_moe.run_dir import CONFIG, checkpoint_root, split_step

GIB = 1 << 30


def root_of(given: str) -> str:
    """The checkpoint root that a run directory names; any other directory is taken as the root itself.

    Raises:
        UserError: there is no such directory.
    """
    if "://" in given:
        return given
    path = Path(given).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"{given} is no directory.")
    return checkpoint_root(read_config(path), path) if (path / CONFIG).is_file() else str(path)


def show(root: str, verify: bool) -> int:
    """Print one line per checkpoint. Returns 1 if one of them is damaged and was verified, else 0."""
    damaged = 0
    print(f"{'step':>10}  {'written':19}  {'GiB':>9}  {'timeline':>8}  {'run':8}  state")
    for entry in list_checkpoints(root, verify):
        manifest, identity = entry.manifest, entry.identity
        damaged += entry.state == DAMAGED
        written = "" if manifest is None else manifest.meta.get("time")
        when = _local_time(written) if isinstance(written, float) else ""
        size = "" if manifest is None else f"{manifest.bytes / GIB:.3f}"
        reason = entry.reason.removeprefix(f"{entry.state}: ")
        state = entry.state + (f": {reason}" if reason and entry.state != COMPLETE else "")
        state += ", stays" if entry.state == COMPLETE and manifest is not None and manifest.stays else ""
        timeline = "" if manifest is None else identity.timeline
        _print(f"{entry.step:>10}  {when:19}  {size:>9}  {timeline:>8}  {identity.run[:8]:8}  {state}")
    return 1 if verify and damaged else 0


def diff(one: str, other: str) -> int:
    """Print the differences of two checkpoints, each given by its directory. Returns 0."""
    manifests = []
    for given in (one, other):
        found = split_step(given)
        if found is None:
            raise UserError(f"{given} is no checkpoint: its name is not like step_00000100.")
        manifests.append(load_manifest(*found))
    for line in differences(manifests[0], manifests[1], _keys):
        _print(line)
    return 0


def prune(root: str, yes: bool) -> int:
    """Remove the unfinished and abandoned checkpoints, or list them. Returns 0."""
    with Lease(root, "DIR") as lease:
        if yes:
            lease.confirm()
        steps = [entry.step for entry in list_checkpoints(root) if entry.state in (UNFINISHED, ABANDONED)]
        if not steps:
            print("nothing to remove")
        elif yes:
            remove(root, steps)
            print(f"removed: {', '.join(map(str, steps))}")
        else:
            print(f"--yes would remove: {', '.join(map(str, steps))}")
    return 0


def go_back(run: str, step: int, yes: bool) -> int:
    """Take a run back to the checkpoint of a step, or tell what that would do. Returns 0."""
    later = rewind(run, step, yes)
    behind = f"step {step}; abandoned: {', '.join(map(str, later))}"
    if not later:
        print(f"step {step} is the newest checkpoint: run.resume=auto goes on from there")
    elif yes:
        print(f"the run is back at {behind}; they are removed when it has come as far again with run.resume=auto")
    else:
        print(f"--yes would take the run back to {behind}")
    return 0


def _local_time(written_s: float) -> str:
    """Date and time of so many seconds since the Unix epoch; "" where there is no such date."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written_s))
    except (ValueError, OverflowError, OSError):
        return ""


def _print(line: str) -> None:
    """Print a line with text of a file, which may have characters that no output can encode."""
    print(line.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


def _keys(meta: dict[str, Any]) -> dict[str, Any]:
    known = RunIdentity.of_meta(meta).fingerprint
    digests = {key: value for key, value in known.items() if isinstance(value, str)}
    return {"seed": meta.get("seed")} | digests | dict(known.get("keys", {}))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for bad input, 1 for a damaged checkpoint."""
    parser = argparse.ArgumentParser(prog="elastic-moe checkpoint", description="Look after a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (
        ("list", "show every checkpoint, complete or not"),
        ("verify", "read every file and compare its checksum; exit code 1 if one is damaged"),
        ("prune", "remove unfinished and abandoned checkpoints"),
    ):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("dir", help="a run directory or a checkpoint root")
    commands.choices["prune"].add_argument("--yes", action="store_true", help="remove them; else only list them")
    command = commands.add_parser("rewind", help="take a run back to an earlier checkpoint")
    command.add_argument("dir", help="a run directory")
    command.add_argument("step", type=int, help="step of the checkpoint")
    command.add_argument("--yes", action="store_true", help="do it; else only tell what would be abandoned")
    command = commands.add_parser("diff", help="compare two checkpoints: configuration, units and weights")
    command.add_argument("one", help="directory of a checkpoint")
    command.add_argument("other", help="directory of another one")
    options = parser.parse_args(arguments)
    try:
        if options.command == "diff":
            return diff(options.one, options.other)
        if options.command == "rewind":
            return go_back(options.dir, options.step, options.yes)
        root = root_of(options.dir)
        return prune(root, options.yes) if options.command == "prune" else show(root, options.command == "verify")
    except (UserError, OSError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
