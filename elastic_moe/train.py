"""Entry point of `python -m elastic_moe.train`; the command is `elastic_moe.cli.train`."""

import sys

from elastic_moe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
