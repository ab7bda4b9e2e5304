"""A run as pictures: `elastic-moe report RUN` writes RUN/report.html, and with `--svg FILE` one picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import write_report
from elastic_moe.metrics.report.timeline_svg import write_timeline


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="elastic-moe report",
        description="Draw a run: as one page, report.html in its directory, or with --svg as one picture.",
    )
    parser.add_argument("run", help="the run directory")
    parser.add_argument(
        "--svg", metavar="FILE", help="draw loss, speed and workers over wall-clock time into this file"
    )
    parser.add_argument("--title", default="", help="of the picture; its figures if not given")
    options = parser.parse_args(arguments)
    try:
        if options.svg:
            print(write_timeline(options.run, options.svg, options.title))
        else:
            print(write_report(options.run))
    except (UserError, OSError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
