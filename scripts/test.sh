#!/usr/bin/env bash
# Run the tests in the repository's own environment; arguments go to pytest.
#   scripts/test.sh                  all of them
#   scripts/test.sh tests/unit -x    the fast ones, up to the first failure
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv
cd "$ROOT"
export OMP_NUM_THREADS=1 # many small processes: more threads only fight for the cores
exec "$PYTHON" -m pytest "$@"
