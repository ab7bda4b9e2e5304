"""The process that owns a directory, as its lease names it."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


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
        return cls(uuid.uuid4().hex, socket.gethostname(), this_machine(), os.getpid(), started_s)

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return bool(self.machine) and self.machine == this_machine()

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False for a process of another machine."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started_s) > 2 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Taken(Exception):
    """A living process owns the directory. Attribute `owner`: that process."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.owner = owner


class Watch:
    """Tells living owners from lost ones by their counts, without comparing clocks of two machines."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float, bool]] = {}  # nonce -> count, since when, and whether it has grown

    def is_lost(self, owner: Owner, ttl_s: float) -> bool:
        """Whether an owner is dead, or its count has stood still for so long before our eyes."""
        now_s = time.monotonic()
        beat, since_s, grown = self._seen.get(owner.nonce, (owner.beat, now_s, False))
        if owner.beat != beat:
            since_s, grown = now_s, True
        self._seen[owner.nonce] = owner.beat, since_s, grown
        return owner.is_dead or now_s - since_s > ttl_s

    def is_alive(self, owner: Owner) -> bool:
        """Whether an owner that is not lost has shown that it lives."""
        return owner.is_here or (owner.nonce in self._seen and self._seen[owner.nonce][2])


def awake_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def this_machine() -> str:
    """The boot of this machine and the namespace of this process's id; "" where the system does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    return ""
