"""A lease on an object store: one object per claim, ordered by tickets.

`pyarrow` offers no conditional put. It offers puts that are atomic, and reads and listings that see every put that has
returned (S3 since 2020, GCS, and what is compatible with them). That is what Lamport's bakery algorithm needs ("A new
solution of Dijkstra's concurrent programming problem", 1974, https://lamport.azurewebsites.net/pubs/bakery.pdf): a
process puts a claim without a ticket, lists the others, and takes the next ticket. The claim with the lowest ticket
owns the directory. A claim that is still without a ticket is waited for. So of living processes that come together one
succeeds, however long a put takes.

Claims expire as in `lease.py`, by the watcher's own clock. Who takes over names the claims that it replaces, when it
confirms its own. An owner that stood still for longer than the lease's time finds itself among them at its next beat,
and ends. Until then both believe that they own the directory: a store without conditional puts cannot refuse the late
one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastic_moe.checkpoint.storage import Storage, persistent
from elastic_moe.coordination.owner import Owner, Taken, Watch, awake_s
from elastic_moe.run_dir import CLAIMS

KEPT = 64  # claims that were replaced and are still named
POLL = 5  # looks per beat


@dataclass(frozen=True, slots=True)
class Claim:
    """One process's claim.

    Attributes:
        owner: the process.
        ticket: its place in the order; 0 until it has one.
        replaces: claims that it took the directory over from, and those that these had replaced.
    """

    owner: Owner
    ticket: int = 0
    replaces: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[int, str]:
        """Claims that are smaller come first; one without a ticket comes before all others."""
        return self.ticket, self.owner.nonce if self.ticket else ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Claim | None:
        """Inverse of `to_bytes`; None if it is something else."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            value: dict[str, Any] = json.loads(data)
            owner = Owner(**value["owner"])
            return cls(owner, int(value["ticket"]), tuple(map(str, value["replaces"])))
        return None


class Claims:
    """One process's part in the claims on a place.

    Args:
        place: URI.
        owner: this process.
        beat_s: seconds between two beats.
        ttl_s: a claim whose count stands still for so long has expired.
        sleep: waits so many seconds.
    """

    def __init__(
        self, place: str, owner: Owner, beat_s: float, ttl_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._place, self._mine, self._sleep = place, Claim(owner), sleep
        self._beat_s, self._ttl_s = beat_s, ttl_s
        self._beaten_s = awake_s()
        self._watch = Watch()
        self._behind: frozenset[str] = frozenset()  # claims that are replaced on `confirm`

    def take(self) -> None:
        """Come before all living processes. Claims of dead ones go, silent ones stay until `confirm`.

        Raises:
            Taken: a living process is before this one.
            OSError: the storage fails.
        """
        try:
            self._put()
            last = max((claim.ticket for claim in self._others()), default=0)
            self._mine = replace(self._mine, ticket=last + 1)
            self._put()
            self._wait_for_turn()
        except BaseException:
            with suppress(OSError):
                self.release()
            raise

    def confirm(self) -> bool:
        """Replace the silent claims before this one. Returns whether there were any.

        Raises:
            Taken: one of them is not silent any more, or another process has replaced this one.
            OSError: the storage fails.
        """
        if not self._behind:
            return False
        silent = [claim for claim in self._earlier() if claim.owner.nonce in self._behind]  # who came later comes after
        for claim in silent:
            if not self._watch.is_lost(claim.owner, self._ttl_s):
                raise Taken(claim.owner)
        self._replace(silent)
        self._behind = frozenset()
        return True

    def beat(self) -> bool:
        """Show that this process lives. Returns False if another one has taken over.

        Raises:
            OSError: the storage fails.
        """
        if self._replaced_by(self._others()) is not None:
            return False
        if awake_s() - self._beaten_s > self._ttl_s and not self._is_there():
            return False  # who took over has ended since
        self._put()
        return True

    def release(self) -> None:
        """Take the claim back.

        Raises:
            OSError: the storage fails; the claim expires.
        """
        Storage(self._place).remove(self._name(self._mine.owner.nonce))

    def _wait_for_turn(self) -> None:
        while True:
            earlier = self._earlier()
            waited_for = [claim for claim in earlier if not self._watch.is_lost(claim.owner, self._ttl_s)]
            if not waited_for:
                self._replace([claim for claim in earlier if claim.owner.is_dead])
                self._behind = frozenset(claim.owner.nonce for claim in earlier if not claim.owner.is_dead)
                return
            for claim in waited_for:
                if claim.ticket and self._watch.is_alive(claim.owner):
                    raise Taken(claim.owner)
            self._sleep(self._beat_s / POLL)
            if awake_s() - self._beaten_s > self._beat_s:
                self._put()

    def _earlier(self) -> list[Claim]:
        """Claims that come before this one. Raises Taken if one has replaced it."""
        others = self._others()
        if (other := self._replaced_by(others)) is not None:
            raise Taken(other.owner)
        return [claim for claim in others if claim.order < self._mine.order]

    def _replace(self, lost: list[Claim]) -> None:
        """Name claims as replaced, then delete them."""
        if not lost:
            return
        names = [name for claim in lost for name in (*claim.replaces, claim.owner.nonce)]
        self._mine = replace(self._mine, replaces=(*self._mine.replaces, *names)[-KEPT:])
        self._put()
        for claim in lost:
            persistent(lambda claim=claim: Storage(self._place).remove(self._name(claim.owner.nonce)))

    def _replaced_by(self, others: list[Claim]) -> Claim | None:
        return next((claim for claim in others if self._mine.owner.nonce in claim.replaces), None)

    def _others(self) -> list[Claim]:
        storage = Storage(self._place)
        found: list[Claim | None] = []
        for name in persistent(lambda: storage.sizes(CLAIMS)):
            if name != f"{self._mine.owner.nonce}.json":
                with suppress(FileNotFoundError):
                    found.append(Claim.from_bytes(persistent(lambda name=name: storage.read(f"{CLAIMS}/{name}"))))
        return [claim for claim in found if claim is not None]

    def _is_there(self) -> bool:
        return Storage(self._place).size(self._name(self._mine.owner.nonce)) >= 0

    def _put(self) -> None:
        self._mine = replace(self._mine, owner=replace(self._mine.owner, beat=self._mine.owner.beat + 1))
        content = self._mine.to_bytes()
        persistent(lambda: Storage(self._place).write(self._name(self._mine.owner.nonce), content))
        self._beaten_s = awake_s()

    def _name(self, nonce: str) -> str:
        return f"{CLAIMS}/{nonce}.json"
