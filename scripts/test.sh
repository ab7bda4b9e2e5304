#!/usr/bin/env bash
# Run the tests in the repository's own environment; arguments go to pytest.
#   scripts/test.sh                  all of them
#   scripts/test.sh --fast           about a minute: no Ray, no process groups, on all cores
#   scripts/test.sh tests/dist -x    some of them, up to the first failure
#   scripts/test.sh -m chaos         one tier: unit, golden, chaos, dist, ray or gpu
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
-h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
ensure_venv
cd "$ROOT"
export OMP_NUM_THREADS=1 # many small processes: more threads only fight for the cores
if [ "${1:-}" = --fast ]; then
    shift
    exec "$PYTHON" -m pytest -m "unit and not slow" -n auto "$@"
fi
exec "$PYTHON" -m pytest "$@"
