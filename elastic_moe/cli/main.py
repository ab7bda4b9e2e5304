"""`elastic-moe SUBCOMMAND ...`: one console script. A subcommand's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from elastic_moe import __version__

SUBCOMMANDS = {  # each is the module of this name in elastic_moe.cli, with _ for -
    "train": "train a model on a cluster whose workers may come and go; -m runs a sweep",
    "prepare": "make the token shards of a corpus before a run, in parallel",
    "status": "show how a run is doing, once or with --watch",
    "ctl": "steer a run that goes on: checkpoint, scale, drain, pause, resume, stop",
    "describe": "count a model's parameters, FLOPs and memory per worker",
    "export": "write a run's weights as a Hugging Face checkpoint",
    "generate": "continue a text with a trained model",
    "report": "draw a run as one page or one picture",
    "explain": "show which expert is on which rank, and why it moved",
    "checkpoint": "list, verify, compare and prune the checkpoints of a run, or take it back to one",
    "watch-notices": "drain this machine's Ray node when its cloud says that it will be taken",
    "records": "explain the keys of a run's records, or print their JSON schema",
}


def usage() -> str:
    """The help: each subcommand with one line."""
    lines = ["usage: elastic-moe SUBCOMMAND ...   (elastic-moe SUBCOMMAND --help shows its arguments)", ""]
    lines += [f"  {name:<13} {meaning}" for name, meaning in SUBCOMMANDS.items()]
    return "\n".join([*lines, "", "  --version  print the version"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 for an unknown one."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"elastic-moe {__version__}")
        return 0
    if name not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        given = f"has no subcommand {name!r}" if name else "needs a subcommand"
        print(f"elastic-moe {given}; it can be {known}.", file=sys.stderr)
        return 2
    sys.argv[:] = [f"elastic-moe {name}", *rest]  # Hydra reads its arguments there
    code: int = importlib.import_module(f"elastic_moe.cli.{name.replace('-', '_')}").main()
    return code


if __name__ == "__main__":
    sys.exit(main())
