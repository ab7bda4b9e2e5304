"""The operator's side of a run that goes on: find its coordinator from any machine of the cluster, ask and tell.

The driver leaves the address of its Ray cluster in the run directory (`live.json`). The coordinator actor's name is
made of the run's id, of its directory's path and of the start. So the path alone finds the run, also on a machine that
does not see the directory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from elastic_moe.actors.cluster import silent, unreachable
from elastic_moe.actors.demand import pending_workers
from elastic_moe.actors.link import NAMESPACE, coordinators
from elastic_moe.actors.ray_token import own_path, token_at
from elastic_moe.checkpoint.identity import read_identity
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.run_dir import LIVE

ANSWER_S = 30.0


@dataclass(frozen=True)
class LiveRun:
    """A run that goes on.

    Attributes:
        coordinator: its coordinator actor.
        name: the actor's name.
    """

    coordinator: Any
    name: str

    def status(self) -> dict[str, Any]:
        """The coordinator's status.

        Raises:
            UserError: it does not answer.
        """
        return self._ask("status")

    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            UserError: the coordinator does not answer.
        """
        return self._ask("config")

    def recent(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The run's last records and last events.

        Raises:
            UserError: the coordinator does not answer.
        """
        return self._ask("recent")

    def goodput(self) -> dict[str, Any]:
        """What the workers' time has gone into, as a line of goodput.jsonl.

        Raises:
            UserError: the coordinator does not answer.
        """
        return self._ask("goodput")

    def submit(self, request: dict[str, Any]) -> None:
        """Hand a request over; see `control.requests`.

        Raises:
            UserError: the coordinator does not answer.
        """
        self._ask("submit", request)

    def pending(self) -> int:
        """Number of workers for which Ray has no room yet."""
        return pending_workers(self.name)

    def hosts(self) -> dict[str, tuple[str, str]]:
        """Host name and address of every node, by its id."""
        return {node["NodeID"]: (node["NodeManagerHostname"], node["NodeManagerAddress"]) for node in ray.nodes()}

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.coordinator, method).remote(*arguments), timeout=ANSWER_S)
        except RayTaskError as error:
            raise UserError(f"the run's coordinator refuses this: {error.cause}") from error
        except (RayError, TimeoutError) as error:
            raise UserError(f"the run's coordinator did not answer: {type(error).__name__}") from error


@contextmanager
def announced(run_dir: Path) -> Iterator[None]:
    """While this lasts, `live_run` finds this run, whose Ray this process is connected to."""
    path = run_dir / LIVE
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(json.dumps({"ray": ray.get_runtime_context().gcs_address, "token_path": own_path()}))
    new.replace(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


@contextmanager
def live_run(run_dir: Path, address: str = "") -> Iterator[LiveRun]:
    """Connect to the cluster of a run, and to its coordinator.

    Args:
        run_dir: the run directory, as a path on the coordinator's machine.
        address: of the Ray cluster; by default the one in `live.json` or in RAY_ADDRESS, or that of this machine for a
            directory that is not here.

    Raises:
        UserError: no cluster answers, or no run of this directory goes on there.
    """
    try:
        identity = read_identity(Storage(str(run_dir)))
    except (OSError, CorruptCheckpoint) as error:
        raise UserError(f"{run_dir} cannot be read as a run directory: {error}") from error
    known = identity is not None and bool(identity.run)
    announced_address, token_path = _announced(run_dir)
    address = address or announced_address or os.environ.get("RAY_ADDRESS", "")
    if known and not address:  # its driver, which wrote live.json, has ended and removed it
        raise UserError(f"no run in {run_dir} goes on; if this is a copy of its directory, give --address")
    address = address or "auto"
    where = "" if known else f"{run_dir} is not the directory of a run on this machine, and "
    if reason := unreachable(address):
        raise UserError(f"{where}no Ray cluster answers at {address} ({reason}): the run has ended, or give --address")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with token_at(token_path if Path(token_path).is_file() else ""):
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"{where}{silent(address)}: give --address, or set RAY_ADDRESS") from error
        try:
            directories = [*([identity.run_dir] if identity is not None and identity.run else []), str(run_dir)]
            names = [name for directory in directories for name in reversed(coordinators(directory))]
            live = next(filter(None, map(_live, names)), None)
            if live is None:
                raise UserError(f"{where}no run in {run_dir} goes on in the Ray cluster at {address}")
            yield live
        finally:
            ray.shutdown()


def _live(name: str) -> LiveRun | None:
    """The run with this coordinator; None if there is none."""
    try:
        return LiveRun(ray.get_actor(name, namespace=NAMESPACE), name)
    except ValueError:
        return None


def _announced(run_dir: Path) -> tuple[str, str]:
    """The address of the run's Ray, and the file with the token of an embedded one; "" for what is not told."""
    try:
        told = json.loads((run_dir / LIVE).read_text())
        return str(told["ray"]), str(told.get("token_path", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""
