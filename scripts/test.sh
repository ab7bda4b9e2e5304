#!/usr/bin/env bash
# Run the tests in the repository's own environment; arguments go to pytest.
#   scripts/test.sh                  all but the long ones, two at a time
#   scripts/test.sh --long           those that are left out, about an hour
#   scripts/test.sh --fast           about a minute: no Ray, no process groups, on all cores
#   scripts/test.sh tests/dist -x    some of them, up to the first failure
#   scripts/test.sh -m chaos         one tier: unit, golden, chaos, dist, ray or gpu
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
-h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
ensure_venv
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes: each would compile all modules
export OMP_NUM_THREADS=1 # many small processes: more threads only fight for the cores
if [ "${1:-}" = --fast ]; then
    shift
    exec "$PYTHON" -m pytest -m "unit and not slow and not long" -n auto "$@"
fi
if [ "${1:-}" = --long ]; then
    shift
    exec "$PYTHON" -m pytest -m long "$@"
fi
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
say "compiling the planner, if its sources have changed"
"$PYTHON" -m elastic_moe.plan.warm
failed=0
"$PYTHON" -m pytest -m "(unit or golden or chaos) and not long" -n auto --maxprocesses 8 || failed=1
"$PYTHON" -m pytest -m "dist and not long" -n 3 --dist loadfile || failed=1
"$PYTHON" -m pytest -m "(ray or gpu) and not long" -n 2 --dist worksteal || failed=1
say "not run: the tests marked long (scripts/test.sh --long)"
exit $failed
