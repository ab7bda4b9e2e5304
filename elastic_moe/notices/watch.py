"""Waits for the notice that this machine will be taken, and then drains its Ray node, once.

Nothing here waits without a bound. A metadata service that fails is asked again, with pauses that grow. A drain that
fails is tried again until the machine's end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic_moe.errors import UserError
from elastic_moe.notices.answers import MetadataError, Notice
from elastic_moe.notices.clouds import Cloud

DETECT_S = 60.0
PAUSE_MAX_S = 15.0
TRY_AGAIN_S = 1.0
DONE, FAILED = 0, 1  # exit codes; 2 is a UserError's
Say = Callable[[str], None]


@dataclass(frozen=True)
class RayNode:
    """A Ray node of this machine.

    Attributes:
        node_id: in hex.
        address: of its cluster's GCS, HOST:PORT.
    """

    node_id: str
    address: str


class Machine(Protocol):
    """What runs on this machine, and how it is drained."""

    def nodes(self) -> Sequence[RayNode]:
        """The Ray nodes that live here now."""
        ...

    def drain(self, node: RayNode, notice: Notice, within_s: float) -> str:
        """Ask the cluster to drain a node. Returns "", or why it was not done."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long what is waited for.

    Attributes:
        every_s: seconds between two polls.
        start_s: seconds for Ray to start on this machine.
        gone_s: seconds after which Ray, once seen and gone, will not come back.
        drain_s: seconds for one try to drain.
    """

    every_s: float = 2.0
    start_s: float = 600.0
    gone_s: float = 60.0
    drain_s: float = 20.0


def detect(known: Mapping[str, Cloud], stopped: threading.Event, say: Say, within_s: float = DETECT_S) -> Cloud | None:
    """The provider whose metadata service answers here; None if `stopped` is set before.

    Raises:
        UserError: none does.
    """
    until_s = time.monotonic() + within_s
    say(f"asking the metadata service whose machine this is, for at most {within_s:g} s")
    while not stopped.is_set():
        for cloud in known.values():
            if cloud.recognised():
                say(f"this is a machine of {cloud.name}")
                return cloud
        if time.monotonic() > until_s:
            raise UserError(
                f"no metadata service of {', '.join(known)} answered within {within_s:g} s: this machine is of none of "
                "them, or its containers may not ask (on AWS: the hop limit of the metadata options)"
            )
        stopped.wait(TRY_AGAIN_S)
    return None


def watch(cloud: Cloud, machine: Machine, stopped: threading.Event, say: Say, patience: Patience) -> int:
    """Poll until there is a notice, Ray has ended here, or `stopped` is set. Returns the exit code."""
    say(f"watching {cloud.name} every {patience.every_s:g} s")
    presence = _Presence(patience, say)
    failures, told = 0, ""
    while not stopped.is_set():
        began_s = time.monotonic()
        pause_s = patience.every_s
        try:
            if notice := cloud.poll(patience.every_s):
                return _drain(notice, machine, stopped, say, patience)
            if failures:
                say(f"the metadata service answers again, after {failures} failures")
            failures, told = 0, ""
        except MetadataError as error:
            failures += 1
            pause_s = min(patience.every_s * 2**failures, PAUSE_MAX_S)
            if str(error) != told:
                told = str(error)
                say(f"the metadata service did not tell ({told}); asking again, at least every {PAUSE_MAX_S:g} s")
        if (ended := presence.ended(machine.nodes(), time.monotonic())) is not None:
            return ended
        stopped.wait(max(0.0, pause_s - (time.monotonic() - began_s)))
    say("stopped")
    return DONE


class _Presence:
    """Whether Ray is still to be expected on this machine."""

    def __init__(self, patience: Patience, say: Say) -> None:
        self._patience, self._say = patience, say
        self._since_s = time.monotonic()
        self._last: frozenset[RayNode] = frozenset()
        self._seen = False

    def ended(self, nodes: Sequence[RayNode], now_s: float) -> int | None:
        """The exit code when Ray has ended here or never came, else None."""
        here = frozenset(nodes)
        for node in sorted(here - self._last, key=lambda node: node.node_id):
            self._say(f"found Ray node {node.node_id} of the cluster {node.address}")
        self._last = here
        if here:
            self._since_s, self._seen = now_s, True
            return None
        away_s = now_s - self._since_s
        if self._seen and away_s > self._patience.gone_s:
            self._say(f"Ray has ended on this machine {away_s:.0f} s ago; nothing is left to drain")
            return DONE
        if not self._seen and away_s > self._patience.start_s:
            self._say(f"no Ray node has started on this machine within {away_s:.0f} s")
            return FAILED
        return None


def drain_now(machine: Machine, seconds: float, stopped: threading.Event, say: Say, patience: Patience) -> int:
    """Drain the Ray nodes of this machine at once, and wait until they have ended. Returns the exit code."""
    if not machine.nodes():
        say("no Ray node runs on this machine; nothing is left to drain")
        return DONE
    notice = Notice("asked for on this machine", time.time() + seconds)
    code = _drain(notice, machine, stopped, say, patience)
    while code == DONE and machine.nodes() and time.time() < notice.deadline_s:
        stopped.wait(TRY_AGAIN_S)
        if stopped.is_set():
            break
    say("Ray still runs on this machine" if machine.nodes() else "Ray has ended on this machine")
    return code


def _drain(notice: Notice, machine: Machine, stopped: threading.Event, say: Say, patience: Patience) -> int:
    """Drain every Ray node of this machine once, until the machine's end. Returns the exit code."""
    left_s = notice.deadline_s - time.time()
    say(f"notice: {notice.text}, in {left_s:.0f} s")
    drained: set[RayNode] = set()
    told = ""
    while not stopped.is_set():
        for node in machine.nodes():
            left_s = notice.deadline_s - time.time()
            if node in drained or left_s <= 0:
                continue
            if why := machine.drain(node, notice, min(patience.drain_s, left_s)):
                if why != told:
                    told = why
                    say(f"Ray node {node.node_id} is not drained yet ({why}); trying again until the machine's end")
            else:
                drained.add(node)
                say(f"Ray node {node.node_id} is draining: {notice.text}")
        if drained and all(node in drained for node in machine.nodes()):
            return DONE
        if time.time() >= notice.deadline_s:
            break
        stopped.wait(TRY_AGAIN_S)
    how = "was stopped" if stopped.is_set() else "has come to the machine's end"
    say(f"this {how}, and not every Ray node of the machine was drained")
    return FAILED
