"""Drains this machine's Ray node when its cloud says that the machine will be taken: `elastic-moe watch-notices`.

It runs beside `ray start` on each node, and ends when the node is drained or Ray has ended there (exit code 0). Exit
code 1: the notice came, and Ray did not accept the drain before the machine's end; or Ray never started. 2: bad input,
or a machine of none of these clouds. `--now` is for hooks that are called at a machine's or container's end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime

from elastic_moe.actors.own_node import OwnNodes
from elastic_moe.cli.seconds import check_seconds
from elastic_moe.errors import UserError
from elastic_moe.notices.clouds import clouds
from elastic_moe.notices.metadata import LINK_LOCAL, MetadataClient
from elastic_moe.notices.watch import DETECT_S, DONE, Patience, detect, drain_now, watch

ENDPOINT = "ELASTIC_MOE_METADATA_ENDPOINT"
PROVIDERS = ("auto", "aws", "gcp", "azure")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        check_seconds(options, "every", "detect", "now")
        machine, patience = OwnNodes(options.address, options.node_id), Patience(every_s=options.every)
        if options.now is not None:
            return drain_now(machine, options.now, stopped, _say, patience)
        client = MetadataClient(options.endpoint or os.environ.get(ENDPOINT) or LINK_LOCAL)
        known = clouds(client, options.drain_on_rebalance)
        chosen = known.get(options.provider) or detect(known, stopped, _say, options.detect)
        if chosen is None:  # a signal came first
            return DONE
        return watch(chosen, machine, stopped, _say, patience)
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-moe watch-notices",
        description="Drain this machine's Ray node when its cloud says that the machine will be taken.",
    )
    parser.add_argument("--provider", choices=PROVIDERS, default="auto", help="whose machine this is: auto asks")
    parser.add_argument("--every", metavar="S", type=float, default=2.0, help="seconds between two questions: 2")
    parser.add_argument("--address", default="", help="HOST:PORT of the Ray cluster, where this machine is in several")
    parser.add_argument("--node-id", default="", help="the only Ray node to drain; by default all of this machine")
    parser.add_argument(
        "--drain-on-rebalance", action="store_true", help="take AWS's recommendation to replace a machine for a notice"
    )
    parser.add_argument(
        "--now", metavar="S", type=float, help="ask no cloud: drain at once, and wait S seconds at most for Ray's end"
    )
    parser.add_argument(
        "--detect", metavar="S", type=float, default=DETECT_S, help=f"seconds to find the provider: {DETECT_S:g}"
    )
    parser.add_argument("--endpoint", default="", help=f"of the metadata service: {LINK_LOCAL}, or {ENDPOINT}")
    return parser


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} watch-notices: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
