"""Leases: one living process at a time owns a run directory and a checkpoint root.

A lease is the file `lease.json` with its owner and a count that the owner raises every few seconds. Who finds a lease
watches it: a count that grows is a living owner, and the start is refused. An owner whose count stands still for
`TTL_S`, or whose process on this machine is gone, has lost it. No clocks of two machines are compared.

A silent owner may only stand still. Its successor therefore first prepares all that may fail, and replaces it right
before it changes anything (`confirm`). An owner that shows itself until then goes on, and the successor is refused.

In a local directory a lock of the operating system makes reading and writing one step, so two processes never both
succeed. On an object store each process has an object of its own, see `claims.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from elastic_moe.checkpoint.local_file import lock
from elastic_moe.checkpoint.storage import Storage, persistent
from elastic_moe.coordination.claims import Claims
from elastic_moe.coordination.owner import Owner, Taken, Watch, awake_s
from elastic_moe.errors import UserError
from elastic_moe.run_dir import LEASE, local_path

BEAT_S, TTL_S = 5.0, 30.0
LOCK_POLL_S = 0.01
LOCK = f".{LEASE}.lock"

logger = logging.getLogger(__name__)


class Lease:
    """A lease on one directory. Use as a context manager, and confirm it before the directory is changed.

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
        local, owner = local_path(place), Owner.here()
        self._holder = LeaseFile(local, owner) if local else Claims(place, owner, BEAT_S, TTL_S)
        self.name = f"{key}={place}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self.lost = False

    def __enter__(self) -> Lease:
        with self._told():
            self._holder.take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=BEAT_S)
        with suppress(OSError):
            self._holder.release()

    def confirm(self) -> bool:
        """Replace a silent owner; from here on this process may change the directory.

        Returns:
            Whether an owner was replaced: the directory may hold more than before.

        Raises:
            UserError: the owner has shown that it lives, another process came first, or the lease cannot be written.
        """
        with self._told():
            return self._holder.confirm()

    @contextmanager
    def _told(self) -> Generator[None]:
        """Tell the user why the lease is not to be had."""
        try:
            yield
        except Taken as taken:
            raise UserError(
                f"{self._key}={self._place} is in use by process {taken.owner.pid} on {taken.owner.host}: wait for its "
                "end, or name another directory"
            ) from None
        except OSError as error:
            raise UserError(f"{self._key}={self._place} cannot be written: {error}") from error

    def _beat_on(self) -> None:
        while not self._stopping.wait(BEAT_S):
            try:
                if not self._holder.beat():
                    self.lost = True
                    return
            except Exception:
                logger.exception("the lease on %s cannot be renewed now", self._place)


class LeaseFile:
    """One process's part in the lease on a local directory.

    Args:
        directory: is made.
        owner: this process.
    """

    def __init__(self, directory: Path, owner: Owner) -> None:
        self._directory, self._mine = directory, owner
        self._beaten_s = awake_s()
        self._behind: Watch | None = None  # the silent owner that is replaced on `confirm`, as it was watched

    def take(self) -> None:
        """Become the owner, or where the owner is silent its successor, which writes nothing yet.

        Raises:
            Taken: a living process owns the directory.
            OSError: the directory cannot be written.
        """
        watch = Watch()
        while True:
            with self._guard():
                owner = self._read()
                if owner is None or owner.is_dead:
                    self._write()
                    return
                if watch.is_lost(owner, TTL_S):
                    self._behind = watch
                    return
                if watch.is_alive(owner):
                    raise Taken(owner)
            time.sleep(BEAT_S / 5)

    def confirm(self) -> bool:
        """Replace the silent owner, if there is one. Returns whether one was replaced.

        Raises:
            Taken: the owner is not silent any more, or another process has replaced it.
            OSError: the directory cannot be written.
        """
        if self._behind is None:
            return False
        with self._guard():
            owner = self._read()
            if owner is not None and not self._behind.is_lost(owner, TTL_S):
                raise Taken(owner)
            self._write()
            self._behind = None
        return True

    def beat(self) -> bool:
        """Show that this process lives. Returns False if another one has taken over.

        Raises:
            OSError: the directory cannot be read or written.
        """
        if self._behind is not None:
            return True
        with self._guard():
            owner = self._read()
            slept = awake_s() - self._beaten_s > TTL_S
            if (owner is None and slept) or (owner is not None and owner.nonce != self._mine.nonce):
                return False
            self._mine = replace(self._mine, beat=self._mine.beat + 1)
            self._write()
        return True

    def release(self) -> None:
        """Give the directory back.

        Raises:
            OSError: it cannot be written; the lease runs out.
        """
        with self._guard():
            owner = self._read()
            if owner is not None and owner.nonce == self._mine.nonce:
                Storage(str(self._directory)).remove(LEASE)

    def _read(self) -> Owner | None:
        """The present owner; None if there is none, or the file is damaged."""
        try:
            return Owner(**json.loads(persistent(lambda: Storage(str(self._directory)).read(LEASE))))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        content = json.dumps(asdict(self._mine)).encode()
        persistent(lambda: Storage(str(self._directory)).write(LEASE, content))
        self._beaten_s = awake_s()

    @contextmanager
    def _guard(self) -> Generator[None]:
        """Make reading and writing one step, among all processes that see this directory."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / LOCK).open("w") as file:
            if not lock(file, TTL_S, LOCK_POLL_S):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            yield


def confirm(leases: Sequence[Lease]) -> bool:
    """Confirm all leases, before anything is changed. Returns whether an owner was replaced.

    Raises:
        UserError: the owner of one has shown that it lives.
    """
    replaced = [lease.confirm() for lease in leases]
    return any(replaced)


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
