"""Entry point of `python -m elastic_moe SUBCOMMAND`; the command is `elastic_moe.cli.main`."""

import sys

from elastic_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
