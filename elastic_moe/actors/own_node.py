"""The Ray nodes of this machine: found in its list of processes, and drained by a short-lived process.

Every raylet names its node and its cluster in its command line, so finding them needs no answer of the cluster. The
drain is asked for by a process of its own, which is ended when it takes too long: Ray's client ends its whole process
where the GCS stays away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil

from elastic_moe.notices.answers import Notice
from elastic_moe.notices.watch import RayNode

REASON = "DRAIN_NODE_REASON_PREEMPTION"  # Ray does not refuse it, as it may refuse one for idleness
NODE_FLAG, GCS_FLAG = "--node_id=", "--gcs-address="


def node_of(command: Sequence[str]) -> RayNode | None:
    """The Ray node of a raylet with this command line; None for another process."""
    if not command or not command[0].endswith("/raylet"):
        return None
    found: dict[str, str] = {}
    for flag in (NODE_FLAG, GCS_FLAG):
        for argument in command:
            if argument.startswith(flag):
                found[flag] = argument.removeprefix(flag)
    return RayNode(found[NODE_FLAG], found[GCS_FLAG]) if len(found) == 2 else None


class OwnNodes:
    """The Ray nodes that this machine's end takes along.

    Args:
        address: only those of the cluster with this GCS address; "" for any.
        node_id: only this one; "" for all.
    """

    def __init__(self, address: str = "", node_id: str = "") -> None:
        self._address, self._node_id = address, node_id
        self._raylets: list[tuple[psutil.Process, RayNode]] = []

    def nodes(self) -> list[RayNode]:
        """Those that live now. All processes are looked at only where none is known, or one of them has ended."""
        if not self._raylets or not all(_lives(process) for process, _ in self._raylets):
            self._raylets = list(self._find(psutil.process_iter()))
        return [node for _, node in self._raylets]

    def drain(self, node: RayNode, notice: Notice, within_s: float) -> str:
        """Ask the cluster to drain a node. Returns "", or why it was not done."""
        deadline_ms = int(notice.deadline_s * 1000)
        command = [sys.executable, "-m", __name__, node.address, node.node_id, str(deadline_ms), notice.text]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"its cluster's GCS at {node.address} did not answer within {within_s:.0f} s"
        except OSError as error:
            return f"no process could be started: {error}"
        lines = (done.stderr or done.stdout).strip().splitlines()
        return "" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")

    def _find(self, processes: Iterable[psutil.Process]) -> Iterable[tuple[psutil.Process, RayNode]]:
        for process in processes:
            with suppress(psutil.Error):
                node = node_of(process.cmdline())
                if node and self._address in ("", node.address) and self._node_id in ("", node.node_id):
                    yield process, node


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a cluster to drain a node, as `ray start --block` does at a SIGTERM. Returns the exit code."""
    from ray._raylet import GcsClient  # type: ignore[import-untyped]
    from ray.core.generated import autoscaler_pb2

    parser = argparse.ArgumentParser(description="Drain a Ray node.")
    for name in ("address", "node_id", "deadline_ms", "message"):
        parser.add_argument(name)
    options = parser.parse_args(arguments)
    reason = autoscaler_pb2.DrainNodeReason.Value(REASON)  # type: ignore[attr-defined]
    client = GcsClient(address=options.address)
    accepted, why = client.drain_node(options.node_id, reason, options.message, int(options.deadline_ms))
    if not accepted:
        print(f"the cluster refused: {why}", file=sys.stderr)
    return 0 if accepted else 1


if __name__ == "__main__":
    raise SystemExit(main())
