"""Entry point of `python -m elastic_moe.describe`; the command is `elastic_moe.cli.describe`."""

import sys

from elastic_moe.cli.describe import main

if __name__ == "__main__":
    sys.exit(main())
