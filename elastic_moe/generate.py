"""Entry point of `python -m elastic_moe.generate`; the command is `elastic_moe.cli.generate`."""

import sys

from elastic_moe.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
