"""A run as a page: `elastic-moe report RUN` writes RUN/report.html.

Several runs make one page beside each other. `--serve` shows runs that go on, and `--svg FILE` writes one picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import compare_runs, write_report
from elastic_moe.metrics.report.run_data import RunReader
from elastic_moe.metrics.report.serve import PORT, ReportServer
from elastic_moe.metrics.report.timeline_svg import write_timeline
from elastic_moe.run_dir import EVENTS, METRICS, REPORT


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except (UserError, OSError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-moe report",
        description="Draw runs as one page that needs no network, report.html in the run directory.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory; several are drawn beside each other")
    parser.add_argument("--to", metavar="FILE", default="", help="write the page there; of several runs: ./report.html")
    parser.add_argument(
        "--serve",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help=f"show the page, and follow runs that go on, at [HOST:]PORT: 127.0.0.1:{PORT} if not given; until Ctrl-C",
    )
    parser.add_argument("--svg", metavar="FILE", help="draw loss, speed and workers over time into this file instead")
    parser.add_argument("--title", default="", help="of the picture; its figures if not given")
    return parser


def _report(options: argparse.Namespace) -> int:
    runs: list[str] = options.runs
    if options.svg:
        if len(runs) > 1:
            raise UserError("--svg draws one run; several runs are drawn as a page.")
        print(write_timeline(runs[0], options.svg, options.title))
    elif options.serve is not None:
        return _serve(runs, options.serve)
    else:
        began_s = time.monotonic()
        path = compare_runs(runs, options.to or REPORT) if len(runs) > 1 else write_report(runs[0], options.to)
        print(path)
        print(
            f"elastic_moe: drawn in {time.monotonic() - began_s:.1f} s from {_bytes(runs) / 2**20:.1f} MiB; "
            f"the page has {path.stat().st_size / 2**20:.1f} MiB",
            file=sys.stderr,
        )
    return 0


def _bytes(runs: Sequence[str]) -> int:
    """Size of the records of some runs."""
    return sum(path.stat().st_size for run in runs for path in Path(run).glob("*.jsonl"))


def _serve(runs: Sequence[str], address: str) -> int:
    for run in runs:
        if not any((Path(run) / name).exists() for name in (METRICS, EVENTS)):
            raise UserError(f"{run}: there is neither {METRICS} nor {EVENTS}; is it the directory of a run (run.dir)?")
    host, colon, port = address.rpartition(":") if address else ("127.0.0.1", ":", str(PORT))
    host = host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535 or not host:
        raise UserError(f"--serve {address}: give [HOST:]PORT, such as 127.0.0.1:{PORT}.")
    with ReportServer([RunReader(run) for run in runs], host, int(port)) as server:
        print(server.url, flush=True)
        if not server.local:
            print("elastic_moe: whoever reaches this address can read the page, the configuration too", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
