"""Entry point of `python -m elastic_moe.export`; the command is `elastic_moe.cli.export`."""

import sys

from elastic_moe.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
