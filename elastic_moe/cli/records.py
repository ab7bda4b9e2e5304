"""The reference of a run's records: `elastic-moe records` prints metrics/README.md, or a JSON schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from elastic_moe.metrics.json_schema import json_schema
from elastic_moe.metrics.markdown import markdown
from elastic_moe.run_dir import EVENTS, EXPERTS, GOODPUT, METRICS, SUMMARY


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="elastic-moe records", description="Keys of a run's records: type, unit, meaning."
    )
    files = (METRICS, EVENTS, EXPERTS, GOODPUT, SUMMARY)
    parser.add_argument("--json", choices=files, help="print the JSON schema of this file's lines")
    options = parser.parse_args(arguments)
    print(markdown() if options.json is None else json.dumps(json_schema(options.json), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
