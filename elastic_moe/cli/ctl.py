"""Steers a run that goes on: `elastic-moe ctl RUN checkpoint|scale|drain|pause|resume|stop`.

It works from any machine of the run's Ray cluster. It waits for the effect, and exits with 1 if that did not come in
time: the run goes on trying.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.actors.link import OVER
from elastic_moe.actors.operate import LiveRun, live_run
from elastic_moe.cli.seconds import check_seconds
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError

POLL_S = 0.5
REASON = "asked for by elastic-moe ctl"
Effect = Callable[[], str]  # what has come; "" as long as it has not


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        check_seconds(options, "wait", *(["deadline"] if options.action == "drain" else []))
        with live_run(Path(options.run).expanduser().absolute(), options.address) as live:
            return _ask(live, options)
    except (UserError, OSError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elastic-moe ctl", description="Steer a run that goes on.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--address", default="", help="of the Ray cluster; by default the one that the run told")
    parser.add_argument("--wait", metavar="S", type=float, default=120.0, help="seconds to wait for the effect: 120")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("checkpoint", help="write a checkpoint of the newest step")
    scale = actions.add_parser("scale", help="go on with at most N workers; what is missing is asked of Ray")
    scale.add_argument("workers", type=int, metavar="N")
    drain = actions.add_parser("drain", help="let a worker, or all workers of a node, hand over and leave")
    drain.add_argument("who", help="rank, or the beginning of a worker's or node's id, or a node's name or address")
    drain.add_argument("--deadline", metavar="S", type=float, help="elastic.drain_deadline_s by default")
    actions.add_parser("pause", help="save the state, and make no step until resume; the workers stay")
    actions.add_parser("resume", help="go on after a pause")
    actions.add_parser("stop", help="end the run after the step in flight, with its state saved")
    return parser


def _ask(live: LiveRun, options: argparse.Namespace) -> int:
    """Ask for one thing, and wait until it is there."""
    before = live.status()
    if before["phase"] in OVER:
        raise UserError(f"the run has ended: {before['reason']}")
    request: dict[str, Any] = {"event": options.action, "reason": REASON}
    match options.action:
        case "scale":
            request["workers"] = _workers(options.workers, live.config())
            effect = _scaled(live, options.workers)
        case "drain":
            found = members_of(options.who, before, live.hosts())
            request |= found[0] | {"deadline_s": options.deadline or 0.0}
            effect = _gone(live, found[1])
        case "checkpoint":
            effect = _saved(live, before["step"])
        case "stop":
            effect = _stopped(live)
        case _:
            effect = _phase(live, options.action)
    live.submit(request)
    deadline_s = time.monotonic() + options.wait
    while not (told := effect()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    print(told or f"asked for; it has not come within {options.wait:g} s: look at it with elastic-moe status")
    return 0 if told else 1


def _workers(count: int, config: TrainConfig) -> int:
    from elastic_moe.actors.cluster import max_workers

    least, most = max(1, config.elastic.min_workers), max_workers(config)
    if not least <= count <= most:
        raise UserError(
            f"scale {count}: this run was started for {least} to {most} workers (elastic.min_workers, "
            "elastic.max_workers or the number at its start)"
        )
    return count


def members_of(
    who: str, status: dict[str, Any], hosts: dict[str, tuple[str, str]]
) -> tuple[dict[str, str], frozenset[str]]:
    """Whom an operator means.

    Args:
        who: rank, or the beginning of a worker's or node's id, or a node's host name or address.
        status: the coordinator's.
        hosts: host name and address of every node, by its id.

    Returns:
        `worker` or `node` of a drain request, and the ids of the members that it concerns.

    Raises:
        UserError: it fits nobody, or several.
    """
    workers = [(worker, node) for worker, node, _, _ in status["members"]]
    if who.isdecimal() and int(who) < len(workers):
        worker = workers[int(who)][0]
        return {"worker": worker}, frozenset([worker])
    found = {worker for worker, _ in workers if who and worker.startswith(who)}
    nodes = {node for _, node in workers if who and (node.startswith(who) or who in hosts.get(node, ()))}
    if len(found) + len(nodes) != 1:
        several = "several" if found or nodes else "no"
        known = ", ".join(f"{rank}: worker {w[:8]} on node {n[:8]}" for rank, (w, n) in enumerate(workers))
        raise UserError(f"{who!r} names {several} members of the run; there are {known}")
    if found:
        (worker,) = found
        return {"worker": worker}, frozenset(found)
    (node,) = nodes
    return {"node": node}, frozenset(worker for worker, of in workers if of == node)


def _scaled(live: LiveRun, workers: int) -> Effect:
    def effect() -> str:
        status = live.status()
        size = status["world_size"]
        return f"{size} workers train" if status["entered"] and size == workers and status["limit"] else ""

    return effect


def _gone(live: LiveRun, workers: frozenset[str]) -> Effect:
    def effect() -> str:
        status = live.status()
        left = workers & {member[0] for member in status["members"]}
        return "" if left else f"{len(workers)} workers have handed over; {status['world_size']} train"

    return effect


def _saved(live: LiveRun, step: int) -> Effect:
    def effect() -> str:
        _, events = live.recent()
        saved = max((event["step"] for event in events if event["event"] == "checkpoint"), default=-1)
        return f"the checkpoint of step {saved} is complete" if saved >= step else ""

    return effect


def _stopped(live: LiveRun) -> Effect:
    def effect() -> str:
        try:
            status = live.status()
        except UserError:  # its coordinator has ended
            return "the run has ended"
        return f"the run has ended after step {status['step']}" if status["phase"] in OVER else ""

    return effect


def _phase(live: LiveRun, action: str) -> Effect:
    wanted = {"pause": "waiting", "resume": "running"}[action]

    def effect() -> str:
        status = live.status()
        holds = status["phase"] == wanted and status["paused"] == (action == "pause")
        return f"{'paused' if status['paused'] else 'goes on'} after step {status['step']}" if holds else ""

    return effect


if __name__ == "__main__":
    raise SystemExit(main())
