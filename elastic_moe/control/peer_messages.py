"""Messages of workers about one another: where a group forms, and between two workers that try their link.

`control/codec.py` turns them into lines and back. `meet` and `link` carry the version of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic_moe.control.messages import VERSION

# --- between a member of a group that forms and the rendezvous ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeetMessage:
    """A member has arrived where its group forms. It waits until all members have.

    Attributes:
        token: shared secret of the run.
        group: name of the group, unique in the run.
        rank, world_size: of the member in the group.
        values: pairs of key and value (in base64) for the other members.
    """

    token: str = field(repr=False)
    group: str
    rank: int
    world_size: int
    values: tuple[tuple[str, str], ...]
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class MetMessage:
    """All members of the group have arrived. `values`: the pairs of all of them, as in `MeetMessage`."""

    values: tuple[tuple[str, str], ...]


# --- between two workers that try their link --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkMessage:
    """A worker has reached another.

    Attributes:
        token: shared secret of the links to the other worker.
        back: address to which the other worker should connect before it answers; port 0: none.
    """

    token: str = field(repr=False)
    back: tuple[str, int] = ("", 0)
    worker: str = ""
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class LinkedMessage:
    """The answer. `worker`: who answers; `back`: whether it could connect back."""

    worker: str
    back: bool


# --- names ------------------------------------------------------------------------------------------------------------

RENDEZVOUS: Mapping[str, type[MeetMessage | MetMessage]] = {"meet": MeetMessage, "met": MetMessage}
LINKS: Mapping[str, type[LinkMessage | LinkedMessage]] = {"link": LinkMessage, "linked": LinkedMessage}
PEER_NAMES: Mapping[type, str] = {cls: name for table in (RENDEZVOUS, LINKS) for name, cls in table.items()}
