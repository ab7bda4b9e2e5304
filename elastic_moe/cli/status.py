"""Shows how a run is doing: `elastic-moe status RUN [--watch]`.

The figures are from the files of the run directory, or from the run's coordinator on a machine that does not see them.
Members and what is missing come from the coordinator, where the run goes on and its Ray cluster can be reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from elastic_moe.actors.operate import LiveRun, live_run
from elastic_moe.cli.seconds import check_seconds
from elastic_moe.config.saved import read_config
from elastic_moe.errors import UserError
from elastic_moe.metrics.goodput import account
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.metrics.status_view import render
from elastic_moe.metrics.summary import failure_line, time_line
from elastic_moe.plan.batch_sizes import RunLength
from elastic_moe.run_dir import CONFIG, EVENTS, METRICS

CLEAR = "\x1b[H\x1b[2J"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="elastic-moe status", description="Show how a run is doing.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--address", default="", help="of the Ray cluster; by default the one that the run told")
    parser.add_argument("--watch", action="store_true", help="show it again and again until Ctrl-C or the run's end")
    parser.add_argument("--every", metavar="S", type=float, default=2.0, help="seconds between two views: 2")
    parser.add_argument("--json", action="store_true", help="print the coordinator's status as JSON")
    options = parser.parse_args(arguments)
    run = Path(options.run).expanduser().absolute()
    try:
        check_seconds(options, "every")
        here = (run / CONFIG).is_file()
        with ExitStack() as stack:
            live = _connect(stack, run, options.address, here)
            if options.json:
                print(json.dumps(live.status() | {"goodput": live.goodput()} if live else None))
                return 0
            _show(run, live, here, options.every if options.watch else 0.0)
    except KeyboardInterrupt:
        return 0
    except (UserError, OSError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    return 0


def _connect(stack: ExitStack, run: Path, address: str, here: bool) -> LiveRun | None:
    """The run's coordinator, if it can be reached; else why not is told.

    Raises:
        UserError: it cannot, and the run directory is not on this machine either.
    """
    try:
        return stack.enter_context(live_run(run, address))
    except UserError as error:
        if not here:
            raise
        print(f"elastic_moe: note: {error}", file=sys.stderr)
        return None


def _show(run: Path, live: LiveRun | None, here: bool, every_s: float) -> None:
    """Print the view; with `every_s` again after so many seconds, until the run ends.

    Without the run's files, the coordinator tells the last records and events.
    """
    records, events = Tail(run / METRICS), Tail(run / EVENTS)
    config = read_config(run) if here or live is None else live.config()
    while True:
        status = None
        if live is not None:
            try:
                status = live.status()
            except UserError:  # it has ended since
                live = None
        hosts, pending = (live.hosts(), live.pending()) if live is not None else ({}, 0)
        told = (records.lines(), events.lines()) if here or live is None else live.recent()
        goodput = account(run, config.cluster.price_per_hour) if live is None else live.goodput()
        about = list(filter(None, (time_line(goodput), failure_line(goodput))))
        view = render(*told, RunLength.of(config), status, hosts, pending, time.time(), about)
        print(f"{CLEAR if every_s and sys.stdout.isatty() else ''}{view}", flush=True)
        if not every_s or live is None:
            return
        time.sleep(every_s)


if __name__ == "__main__":
    raise SystemExit(main())
