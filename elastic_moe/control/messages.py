"""Messages between a worker and the coordinator as frozen values.

`control/codec.py` turns them into lines and back. `hello` and `welcome` carry the version of the protocol. `evicted`
keeps its form in every version, because it tells a peer of another version that the two cannot work together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_moe.types import Member, View

VERSION = 10  # of the protocol; every change of a message raises it

WORKER_LOG = "worker_log"  # the event of a line that goes to the worker's log in the run directory, not to the events

JsonObject = Mapping[str, Any]


def _require(payload: JsonObject, name: str, key: str, kind: type) -> None:
    """Raise ValueError if a payload lacks the key, or if its value is of another type."""
    if type(payload.get(key)) is not kind:
        raise ValueError(f"field {name!r} must have {key!r}, {'a text' if kind is str else 'a whole number'}")


# --- from a worker to the coordinator ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HelloMessage:
    """The first message of a connection: registers a worker, or registers it again with a new coordinator.

    Attributes:
        token: shared secret of the run.
        worker, node, pid, slots: its identity, as in `Member`.
        ready: it has warmed up already.
        view: newest view it knows; None if it never was in one.
        entered: generation that it entered last.
        step: last step it committed, as far as it knows.
        lapsed: its lease has run out since it came to know that view.
        version: version of the protocol that it speaks.
        address: as in `Member`.
        sources: digest of the package's sources that it runs; "" if it is not known.
        updates_on: where and how it updates its state, such as "cuda"; "" if it is not known. Equal words, equal bits.
        placed_s, node_kind: as in `Origin`.
    """

    token: str = field(repr=False)
    worker: str
    node: str
    pid: int
    slots: int = 0
    ready: bool = False
    view: View | None = None
    entered: int = 0
    step: int = 0
    lapsed: bool = False
    version: int = VERSION
    address: tuple[str, int] = ("", 0)
    sources: str = ""
    updates_on: str = ""
    placed_s: float = 0.0
    node_kind: str = ""


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """The worker has warmed up and may be put into a view."""


@dataclass(frozen=True, slots=True)
class HeartbeatMessage:
    """A sign of life. `progress` grows within a generation whenever the main thread gets on.

    `sent_s`: time on the worker's own clock; the coordinator's answer brings it back.
    """

    generation: int
    step: int
    progress: int
    sent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SuspectMessage:
    """A collective of this generation failed under the worker."""

    generation: int
    error: str


@dataclass(frozen=True, slots=True)
class LinksMessage:
    """The answer to `CheckLinksMessage`: the fields of `control.events.Links`."""

    check: int
    reached: tuple[str, ...]
    silent: tuple[str, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnteredMessage:
    """The worker has its share of the view's state. `info`: how it got there, for the event log."""

    generation: int
    info: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class RecordMessage:
    """The record of a committed step, for metrics.jsonl. It has at least `step`."""

    record: JsonObject

    def __post_init__(self) -> None:
        _require(self.record, "record", "step", int)


@dataclass(frozen=True, slots=True)
class EventMessage:
    """A line for events.jsonl or experts.jsonl. It has at least `event`, the name."""

    event: JsonObject

    def __post_init__(self) -> None:
        _require(self.event, "event", "event", str)


@dataclass(frozen=True, slots=True)
class ShardMessage:
    """A checkpoint shard is written: its `ShardInfo` as a dictionary, with at least `step`."""

    shard: JsonObject

    def __post_init__(self) -> None:
        _require(self.shard, "shard", "step", int)


@dataclass(frozen=True, slots=True)
class HeldMessage:
    """The worker is done with saving in a hold of this generation.

    Attributes:
        generation: of the hold.
        outcome: one of `types.HOLD_OUTCOMES`.
    """

    generation: int
    outcome: str


@dataclass(frozen=True, slots=True)
class FinishedMessage:
    """The worker did all steps of the run, or agreed to stop."""


@dataclass(frozen=True, slots=True)
class FailingMessage:
    """The worker's program has failed, and its process is about to end. Its state is lost."""

    error: str


@dataclass(frozen=True, slots=True)
class LeftMessage:
    """The worker ends because no view contains it any more."""


WorkerMessage = (
    HelloMessage
    | ReadyMessage
    | HeartbeatMessage
    | SuspectMessage
    | LinksMessage
    | EnteredMessage
    | RecordMessage
    | EventMessage
    | ShardMessage
    | HeldMessage
    | FinishedMessage
    | FailingMessage
    | LeftMessage
)

# --- from the coordinator to a worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WelcomeMessage:
    """The worker is registered.

    Attributes:
        version: version of the protocol that the coordinator speaks.
        files: host and port of its file server; ("", 0) if it has none.
        witness: content of the file `run_dir.WITNESS` in the checkpoint root, by which a worker knows that it sees it;
            "" if the root is an object store.
    """

    version: int = VERSION
    files: tuple[str, int] = ("", 0)
    witness: str = ""


@dataclass(frozen=True, slots=True)
class AliveMessage:
    """The answer to a heartbeat: the worker is registered.

    Attributes:
        sent_s: of the heartbeat; the lease counts from there.
        recorded: the records of all steps up to this one are in the run's files; -1 if that is not known.
    """

    sent_s: float
    recorded: int = -1


@dataclass(frozen=True, slots=True)
class ViewMessage:
    """The next view.

    Attributes:
        view: its members.
        planned: it may wait for a step boundary; else it interrupts the step in flight.
        reason: why it was published.
        store: host and port of the store through which its groups form.
        hold: its members make no step in it: they save what they hold, and wait for the next view.
    """

    view: View
    planned: bool
    reason: str
    store: tuple[str, int]
    hold: bool = False


@dataclass(frozen=True, slots=True)
class ViewChangeMessage:
    """The next view, as a change of the last one that this connection brought; see `control/view_changes.py`.

    Attributes:
        base: generation of that one.
        generation: of the next one.
        removed: ranks of those who leave, in the last view.
        added: members that follow those who stay.
        planned, reason, store, hold: as in `ViewMessage`.
    """

    base: int
    generation: int
    removed: tuple[int, ...]
    added: tuple[Member, ...]
    planned: bool
    reason: str
    store: tuple[str, int]
    hold: bool = False


@dataclass(frozen=True, slots=True)
class PauseMessage:
    """Too few workers are left: keep the state and wait for the next view."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProbeMessage:
    """Send a heartbeat at once."""


@dataclass(frozen=True, slots=True)
class CheckLinksMessage:
    """Try whether the peers can be reached, and answer with a `LinksMessage`. `check`: number of the check."""

    check: int
    peers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ReleaseMessage:
    """The worker is not needed any more and may end itself."""


@dataclass(frozen=True, slots=True)
class EvictedMessage:
    """The worker is no member any more and must not touch the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class SaveMessage:
    """Wish for a checkpoint at the next vote, unless one of `step` or of a later step has been made."""

    step: int


@dataclass(frozen=True, slots=True)
class StopMessage:
    """End the run after the step in flight."""


CoordinatorMessage = (
    WelcomeMessage
    | AliveMessage
    | ViewMessage
    | ViewChangeMessage
    | PauseMessage
    | ProbeMessage
    | CheckLinksMessage
    | ReleaseMessage
    | EvictedMessage
    | SaveMessage
    | StopMessage
)

# --- names ------------------------------------------------------------------------------------------------------------

FROM_WORKER: Mapping[str, type[WorkerMessage]] = {
    "hello": HelloMessage,
    "ready": ReadyMessage,
    "heartbeat": HeartbeatMessage,
    "suspect": SuspectMessage,
    "links": LinksMessage,
    "entered": EnteredMessage,
    "record": RecordMessage,
    "event": EventMessage,
    "shard": ShardMessage,
    "held": HeldMessage,
    "finished": FinishedMessage,
    "failing": FailingMessage,
    "left": LeftMessage,
}
FROM_COORDINATOR: Mapping[str, type[CoordinatorMessage]] = {
    "welcome": WelcomeMessage,
    "alive": AliveMessage,
    "view": ViewMessage,
    "view_change": ViewChangeMessage,
    "pause": PauseMessage,
    "probe": ProbeMessage,
    "check_links": CheckLinksMessage,
    "release": ReleaseMessage,
    "evicted": EvictedMessage,
    "save": SaveMessage,
    "stop": StopMessage,
}
NAMES: Mapping[type, str] = {cls: name for table in (FROM_WORKER, FROM_COORDINATOR) for name, cls in table.items()}
