"""A cluster that several runs share, as the trials of a sweep do: its room for workers, and the link to each run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from elastic_moe.actors.cluster import resources_per_worker
from elastic_moe.actors.link import NAMESPACE, CoordinatorLink, coordinators
from elastic_moe.checkpoint.identity import read_identity
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.config.schema import ClusterConfig
from elastic_moe.errors import UserError

UNLIMITED = 1 << 20  # workers that ask Ray for nothing


def ray_address() -> str:
    """Address of the cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def join(address: str) -> Iterator[None]:
    """Connect to a cluster of this machine, whose processes import this package already.

    Raises:
        UserError: no cluster answers there.
    """
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(f"the sweep's Ray cluster at {address} does not answer: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def room(cluster: ClusterConfig) -> tuple[int, int] | None:
    """Workers for which the cluster has room when nobody uses it, and for which it has some now.

    Returns:
        None while the cluster does not answer.
    """
    needed = {name: amount for name, amount in resources_per_worker(cluster).items() if amount}
    if not needed:
        return UNLIMITED, UNLIMITED
    try:
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        free: dict[str, Any] = available_resources_per_node()
    except (RayError, RuntimeError, OSError):
        return None
    return sum(_fits(nodes[n], needed) for n in nodes), sum(_fits(free.get(n, {}), needed) for n in nodes)


def _fits(has: dict[str, float], needed: dict[str, float]) -> int:
    return int(min(has.get(name, 0.0) / amount + 1e-6 for name, amount in needed.items()))


class RunLink:
    """The way to the coordinator of the run in a directory, which need not have begun. Nothing here waits.

    Args:
        run_dir: its directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._link: CoordinatorLink | None = None

    def poll(self) -> dict[str, Any]:
        """Newest status of the run that has arrived; {} before the first."""
        status = self._link.poll() if self._link is not None else {}
        if self._link is None or self._link.is_gone:
            self._link = self._found()
        return status

    def submit(self, request: dict[str, Any]) -> None:
        """Hand a request over, if the coordinator is there."""
        if self._link is not None:
            self._link.submit(request)

    def _found(self) -> CoordinatorLink | None:
        """The link to the coordinator of the run that the directory holds now; each start puts another one there."""
        try:
            identity = read_identity(Storage(str(self._run_dir)))
            if identity is None or not identity.run:
                return None
            names = coordinators(identity.run_dir, identity.run)
        except (OSError, CorruptCheckpoint, RayError, RuntimeError):  # of storage, or of a cluster that is away
            return self._link
        if not names or (self._link is not None and self._link.name in names):
            return self._link
        return CoordinatorLink(names[-1], quiet=True)
