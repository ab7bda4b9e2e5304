"""A run as pictures: `elastic-moe report RUN` writes RUN/report.html; training does so at its end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="elastic-moe report", description="Draw a run as one page.")
    parser.add_argument("run", help="the run directory")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
