#!/usr/bin/env bash
# Starts one Ray node on this machine and stays until it ends. A SIGTERM drains the node first: no step is lost.
#   cluster/start-node.sh head [options of ray start]
#   cluster/start-node.sh worker HEAD:PORT [options of ray start]         # waits for the head, ten minutes at most
#   cluster/start-node.sh spot-worker HEAD:PORT [options of ray start]    # the same, and waits for the cloud's notice
#   cluster/start-node.sh wait HEAD:PORT                                  # starts nothing, only waits for the head
# elastic-moe and ray have to be on the PATH: activate the environment first.
set -euo pipefail

HEAD_WAIT_S=600
TRIES=4
EARLY_S=120
: "${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:=60}" # how long Ray waits for our workers after a SIGTERM
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

wait_for_head() {
    local host=${1%:*} port=${1##*:} began=$SECONDS
    until (exec 3<> "/dev/tcp/$host/$port") 2> /dev/null; do
        if ((SECONDS - began > HEAD_WAIT_S)); then
            echo "start-node: no head answered at $1 within $HEAD_WAIT_S s" >&2
            exit 1
        fi
        ((SECONDS == began)) && echo "start-node: waiting for the head at $1, at most $HEAD_WAIT_S s"
        sleep 1
    done
}

# Ray gives a node 30 s to start, and a busy machine may need more: a node that ends early by itself is started again.
run_node() {
    local try code began
    for ((try = 1; try <= TRIES; try++)); do
        began=$SECONDS
        ray start --block "$@" &
        node=$!
        trap 'stopped=yes; kill -TERM "$node" 2> /dev/null || true' TERM INT
        code=0
        wait "$node" || code=$?
        while kill -0 "$node" 2> /dev/null; do # a signal ended the wait, not the node
            code=0
            wait "$node" || code=$?
        done
        [[ -z $stopped ]] && ((SECONDS - began < EARLY_S && try < TRIES)) || exit "$code"
        echo "start-node: the node ended after $((SECONDS - began)) s with code $code; trying again ($try of $TRIES)"
    done
}

node=
stopped=
role=${1:-}
case $role in
    head)
        shift
        run_node --head "$@"
        ;;
    wait | worker | spot-worker)
        [[ ${2:-} == *:* ]] || usage
        address=$2
        shift 2
        wait_for_head "$address"
        [[ $role != wait ]] || exit 0
        if [[ $role == spot-worker ]]; then
            export RAY_NODE_MARKET_TYPE=${RAY_NODE_MARKET_TYPE:-spot} # a run that shrinks gives these up first
            elastic-moe watch-notices --address "$address" &
        fi
        run_node --address="$address" "$@"
        ;;
    *) usage ;;
esac
