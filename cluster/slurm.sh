#!/bin/bash
# A run on a Slurm allocation: Ray on every node, and the training as the batch step.
#   sbatch --nodes=4 --gpus-per-node=1 cluster/slurm.sh model=medium elastic.min_workers=2 run.dir=/shared/runs/a ...
# Submit it from the checkout, with the environment activated. Everything after the script's name is an override.
#SBATCH --job-name=elastic-moe
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# --no-kill: a node that fails does not end the job; the others go on. --signal: 180 s before the time limit the batch
# script stops the run with its state saved and puts the job back into the queue. run.resume=auto then goes on.
set -euo pipefail

DRAIN_S=60
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$DRAIN_S # a node that Slurm preempts gets SIGTERM, and drains
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs of one node do not meet
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }') # the address at which the other nodes know it
[[ -n $head_ip ]] || { echo "slurm.sh: the name $head of the first node has no address" >&2 && exit 1; }
here=${SLURM_SUBMIT_DIR:-$PWD}

steps=()
on_node() { # NODE ROLE [ARGUMENT...]: a step of its own, so that the loss of one ends no other
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --kill-on-bad-exit=0 "$here/cluster/start-node.sh" "$@" &
    steps+=($!)
}

driver=
stopped=
# shellcheck disable=SC2329 # a trap calls it
end_nodes() {
    trap '' TERM INT
    kill -TERM "${steps[@]}" 2> /dev/null || true
    wait "${steps[@]}" 2> /dev/null || true
}
# shellcheck disable=SC2329 # a trap calls it
stop_run() {
    stopped=yes
    [[ -z $driver ]] || kill -TERM "$driver" 2> /dev/null || true
}
trap stop_run TERM INT
trap end_nodes EXIT

on_node "$head" head --node-ip-address="$head_ip" --port=$port --include-dashboard=false
for node in "${nodes[@]:1}"; do
    on_node "$node" worker "$head_ip:$port"
done

"$here/cluster/start-node.sh" wait "$head_ip:$port"
[[ -z $stopped ]] || exit 143
elastic-moe train cluster=address "cluster.address=$head_ip:$port" "cluster.workers=${#nodes[@]}" \
    run.resume=auto "$@" &
driver=$!
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ended the wait, not the driver
    code=0
    wait "$driver" || code=$?
done
if [[ -n $stopped && $code == 143 ]]; then
    echo "slurm.sh: the run was stopped with its state saved; the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
