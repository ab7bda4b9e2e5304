"""Entry point of `python -m elastic_moe.report`; the command is `elastic_moe.cli.report`."""

import sys

from elastic_moe.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
