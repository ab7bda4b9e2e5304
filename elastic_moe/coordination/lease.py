"""Leases: one living process at a time owns a run directory and a checkpoint root.

A lease is the file `lease.json` with its owner and a count that the owner raises every few seconds. Who finds a lease
watches it: a count that grows is a living owner, and the start is refused. An owner whose count stands still for
`TTL_S`, or whose process on this machine is gone, has lost it. No clocks of two machines are compared.

In a local directory a lock of the operating system makes reading and writing one step, so two processes never both
succeed. Object stores offer no conditional put through pyarrow. There the file is written, and read again after
`SETTLE_S`: of several writers the last one stays. A write that the store delays for longer than that may let two
succeed; the earlier one then finds out at its next heartbeat and ends.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from elastic_moe.checkpoint.storage import Storage, persistent
from elastic_moe.errors import UserError
from elastic_moe.run_dir import LEASE

BEAT_S, TTL_S, SETTLE_S = 5.0, 30.0, 2.0
LOCK = f".{LEASE}.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        nonce: unique id of this lease.
        host: name of its machine, for people.
        machine: boot and process namespace of the machine: only there does `pid` mean anything.
        pid, started_s: its process, and when that began.
        beat: grows while the owner lives.
    """

    nonce: str
    host: str
    machine: str
    pid: int
    started_s: float
    beat: int = 0

    @classmethod
    def here(cls) -> Owner:
        """This process as an owner."""
        started_s = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), started_s)

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False for a process of another machine."""
        if self.machine != _machine() or not self.machine:
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started_s) > 2 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Lease:
    """A lease on one directory. Use as a context manager.

    Args:
        place: directory or URI.
        key: configuration key that names it, for the message.

    Raises:
        UserError: on entering: another process owns the directory, or the lease cannot be written.

    Attributes:
        name: the key and the place, for people.
        lost: another process has taken the directory over.
    """

    def __init__(self, place: str, key: str) -> None:
        self._place, self._key = place, key
        self._local = place.removeprefix("file://") if "://" not in place or place.startswith("file://") else ""
        self._mine = Owner.here()
        self.name = f"{key}={place}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self.lost = False

    def __enter__(self) -> Lease:
        try:
            self._acquire()
        except OSError as error:
            raise UserError(f"{self._key}={self._place} cannot be written: {error}") from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=BEAT_S)
        with suppress(OSError), self._guard():
            owner = self._read()
            if owner is not None and owner.nonce == self._mine.nonce:
                Storage(self._place).remove(LEASE)

    def _acquire(self) -> None:
        first: Owner | None = None
        since_s = time.monotonic()
        while True:
            with self._guard():
                owner = self._read()
                if first is None or owner is None or owner.nonce != first.nonce:
                    first, since_s = owner, time.monotonic()
                if owner is None or owner.is_dead or time.monotonic() - since_s > TTL_S:
                    self._write()
                    if self._local:
                        return
                elif owner.machine == self._mine.machine != "" or owner.beat != (first.beat if first else -1):
                    raise UserError(
                        f"{self._key}={self._place} is in use by process {owner.pid} on {owner.host}: wait for its "
                        "end, or name another directory"
                    )
            time.sleep(SETTLE_S if not self._local else BEAT_S / 5)
            if not self._local and (owner := self._read()) is not None and owner.nonce == self._mine.nonce:
                return

    def _beat_on(self) -> None:
        while not self._stopping.wait(BEAT_S):
            try:
                with self._guard():
                    owner = self._read()
                    if owner is not None and owner.nonce != self._mine.nonce:
                        self.lost = True
                        return
                    self._mine = replace(self._mine, beat=self._mine.beat + 1)
                    self._write()
            except Exception:
                logger.exception("the lease on %s cannot be renewed now", self._place)

    def _read(self) -> Owner | None:
        """The present owner; None if there is none, or the file is damaged."""
        try:
            return Owner(**json.loads(persistent(lambda: Storage(self._place).read(LEASE))))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        content = json.dumps(asdict(self._mine)).encode()
        persistent(lambda: Storage(self._place).write(LEASE, content))

    @contextmanager
    def _guard(self) -> Generator[None]:
        """Make reading and writing one step, among all processes that see this local directory."""
        if not self._local:
            yield
            return
        directory = Path(self._local).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOCK).open("w") as file:
            deadline_s = time.monotonic() + TTL_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.01)
            yield


def lost(leases: Sequence[Lease]) -> str:
    """A sentence about a lease that another process has taken over; "" while all are held."""
    taken = [lease for lease in leases if lease.lost]
    return f"another process has taken over {taken[0].name}" if taken else ""


@contextmanager
def own(run_dir: Path, root: str) -> Generator[list[Lease]]:
    """Own a run directory and a checkpoint root.

    Raises:
        UserError: another living process owns one of them.
    """
    places = {"run.dir": str(run_dir), "checkpoint.dir": root}
    if "://" not in root and Path(root).expanduser().absolute() == run_dir:
        del places["checkpoint.dir"]
    with ExitStack() as stack:
        yield [stack.enter_context(Lease(place, key)) for key, place in places.items()]


def _machine() -> str:
    """The boot of this machine and the namespace of this process's id; "" where the system does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    return ""
