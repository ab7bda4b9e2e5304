"""How the processes of a run find the coordinator actor, and how the controller talks to it without waiting.

The coordinator is a named actor that Ray restarts. Its TCP address changes with each restart, so workers ask for it
anew after every lost connection. Ray repeats calls over a restart (`max_task_retries`), so every event is idempotent.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError

NAMESPACE = "elastic_moe"
OVER = ("finished", "failed")  # phases of a run that has ended
LAST_SAVE_MARGIN_S = 30.0  # beyond the time for which the coordinator itself waits for the last save
FIND_TIMEOUT_S = 3.0
MAX_READABLE = 80  # letters of a run directory's name that a run keeps in its name
TOKEN_TIMEOUT_S, RETRY_S = 120.0, 0.2  # for a coordinator that Ray is just starting again

logger = logging.getLogger(__name__)


def actor_name(run_id: str, run_dir: str = "", start: str = "") -> str:
    """Name of the coordinator actor of one start of a run. Copies of a run directory are runs of their own.

    Each start has a name of its own, so one that has lost its directory to another never finds that one's actors.
    """
    parts = ("elastic_moe", run_id, *([_digest(run_dir)] if run_dir else []), *([start] if start else []))
    return ":".join(parts)


def _digest(run_dir: str) -> str:
    return hashlib.sha256(run_dir.encode()).hexdigest()[:8]


def start_name() -> str:
    """A name for a start. Of two starts of one run the later one's is the greater one."""
    return f"{time.time_ns() // 1_000_000:012x}"


def coordinators(run_dir: str, run_id: str = "") -> list[str]:
    """Names of the coordinators of this directory of which Ray knows actors, the newest start last.

    Args:
        run_dir: the directory, as the run knows it.
        run_id: of that run alone; "" for any run.
    """
    found = [name.partition("/")[0].split(":") for name in named_actors(actor_name(run_id))]
    return sorted({":".join(parts) for parts in found if len(parts) > 2 and parts[2] == _digest(run_dir)})


def named_actors(prefix: str) -> list[str]:
    """Names of the actors that Ray knows, those that are being started too, and that begin so."""
    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return sorted(e["name"] for e in named if e["namespace"] == NAMESPACE and e["name"].startswith(prefix))


@dataclass(frozen=True)
class TrainNames:
    """How Ray Train knows a run: in its state, and in the tags of all metrics of the run.

    Attributes:
        name: of the run directory, with the first digits of the id.
        id: the same for every driver and controller of the run: what goes on after one of them is the same run.
    """

    name: str
    id: str


def train_names(coordinator: str, run_dir: str) -> TrainNames:
    """The names of the run with this coordinator. The name is also that of a directory and a part of addresses."""
    run_id = "".join(coordinator.split(":")[1:3])
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(run_dir).name).strip("-.")[:MAX_READABLE]
    return TrainNames("-".join(filter(None, (readable, run_id[:8]))), run_id)


def this_node() -> dict[str, str]:
    """The label selector of an actor that has to be on the caller's node."""
    return {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}


def find_coordinator(name: str) -> tuple[str, int] | None:
    """Ask Ray where a run's coordinator listens now.

    Returns:
        Host and port, or None while there is no coordinator that answers.
    """
    try:
        handle = ray.get_actor(name, namespace=NAMESPACE)
        host, port = ray.get(handle.address.remote(), timeout=FIND_TIMEOUT_S)
    except (ValueError, RayError, TimeoutError):  # no such actor; dead, restarting or busy
        return None
    return host, port


def fetch_token(name: str) -> str:
    """Ask a run's coordinator for the run's token.

    Raises:
        RuntimeError: no coordinator answers within `TOKEN_TIMEOUT_S`.
    """
    deadline_s = time.monotonic() + TOKEN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            handle = ray.get_actor(name, namespace=NAMESPACE)
            return str(ray.get(handle.token.remote(), timeout=FIND_TIMEOUT_S))
        except (ValueError, RayError, TimeoutError):  # restarting, or busy
            time.sleep(RETRY_S)
    raise RuntimeError(f"no coordinator named {name} answered for {TOKEN_TIMEOUT_S:.0f} s")


@dataclass(frozen=True)
class Finder:
    """`find_coordinator` of one run, as a value that travels to workers."""

    name: str

    def __call__(self) -> tuple[str, int] | None:
        return find_coordinator(self.name)


class CoordinatorLink:
    """The controller's and the driver's side: the newest known status, and events handed over; nothing here blocks.

    Args:
        name: the coordinator actor's name.
        clock: monotonic seconds.
        quiet: a coordinator that does not answer is no news, since its run may have ended.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic, quiet: bool = False) -> None:
        self.name, self._clock = name, clock
        self._level = logging.DEBUG if quiet else logging.WARNING
        self._handle: Any = None
        self._asked: Any = None
        self._answered_s = clock()
        self._status: dict[str, Any] = {}

    @property
    def silent_s(self) -> float:
        """Seconds since the coordinator last answered."""
        return self._clock() - self._answered_s

    @property
    def is_gone(self) -> bool:
        """Whether Ray knew no such coordinator when it was last looked for."""
        return self._handle is None

    def forget(self) -> None:
        """Forget the status that has arrived and the question that is under way."""
        self._asked, self._status = None, {}

    def submit(self, event: dict[str, Any]) -> None:
        """Hand an event over; Ray retries it if the coordinator restarts."""
        if (handle := self._find()) is not None:
            handle.submit.remote(event)

    def poll(self) -> dict[str, Any]:
        """Newest status that has arrived ({} before the first), and ask for the next one."""
        if self._asked is not None:
            done, _ = ray.wait([self._asked], timeout=0)
            if done:
                self._asked = None
                try:
                    self._status = ray.get(done[0])
                    self._answered_s = self._clock()
                except RayError as error:
                    logger.log(self._level, "coordinator did not answer: %s", str(error).splitlines()[0])
                    self._handle = None
        if self._asked is None and (handle := self._find()) is not None:
            self._asked = handle.status.remote()
        return self._status

    def _find(self) -> Any:
        if self._handle is None:
            try:
                self._handle = ray.get_actor(self.name, namespace=NAMESPACE)
            except (ValueError, RayError):
                return None
        return self._handle
