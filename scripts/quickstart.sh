#!/usr/bin/env bash
# Train a small MoE on four workers of this machine, kill one on the way, and watch the others go on.
#   scripts/quickstart.sh [--no-kill] [key=value ...]     e.g. scripts/quickstart.sh run.steps=300 model.num_experts=32
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

kill_step=30
overrides=()
for argument in "$@"; do
    case "$argument" in
        --no-kill) kill_step=0 ;;
        -h | --help) sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) overrides+=("$argument") ;;
    esac
done

ensure_venv
unset RAY_ADDRESS # on this machine, whatever cluster is near
cd "$ROOT"
if [ "$kill_step" -gt 0 ]; then
    say "training; the worker of rank 1 is killed after step $kill_step (--no-kill: undisturbed)"
else
    say "training undisturbed"
fi
code=0
"$PYTHON" -m elastic_moe.train model=small run.dir=runs/quickstart run.overwrite=true run.steps=200 \
    "faults.kill_worker_at_step=$kill_step" ${overrides[@]+"${overrides[@]}"} || code=$?
if [ "$code" -eq 0 ]; then
    say "done; look at report.html in the run directory (default runs/quickstart); metrics.jsonl, events.jsonl and checkpoints/ are there too"
fi
exit "$code"
