"""Entry point of `python -m elastic_moe.plan.explain`; the command is `elastic_moe.cli.explain`."""

import sys

from elastic_moe.cli.explain import main

if __name__ == "__main__":
    sys.exit(main())
