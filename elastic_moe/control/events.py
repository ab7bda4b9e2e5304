"""Events that the membership machine takes and commands that it gives, as frozen values.

Only `coordination/membership.py` makes events of messages and requests, and only it carries commands out.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.types import SAVED, Member, View

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker registers, or re-registers after the coordinator was lost.

    Attributes:
        worker, node, pid, slots: its identity, as in `Member`.
        ready: it has warmed up already.
        view: newest view it knows; None if it never was in one.
        entered: generation that it entered last.
        step: last step it committed, as far as it knows.
        lapsed: its lease has run out since it came to know that view, so another one may have followed.
        address: as in `Member`.
        on_spot: its node is a spot machine.
    """

    worker: str
    node: str
    pid: int
    slots: int = 0
    ready: bool = False
    view: View | None = None
    entered: int = 0
    step: int = 0
    lapsed: bool = False
    address: tuple[str, int] = ("", 0)
    on_spot: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has warmed up and may be put into a view."""

    worker: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life. `progress` grows within a generation whenever the main thread gets on."""

    worker: str
    generation: int = 0
    step: int = 0
    progress: int = 0


@dataclass(frozen=True, slots=True)
class Suspect:
    """A collective failed under the worker. Perhaps a peer has died, perhaps only a connection has broken."""

    worker: str
    generation: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Links:
    """The worker has tried its links to others.

    Attributes:
        check: number of the check, as in `CheckLinks`.
        reached: workers to which there is a connection both ways.
        silent: workers that cannot be reached, or do not answer.
        refused: workers whose host answers, but nobody listens at their address.
    """

    worker: str
    check: int
    reached: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entered:
    """The worker has its share of the view's state and trains in it."""

    worker: str
    generation: int


@dataclass(frozen=True, slots=True)
class Held:
    """The worker is done with saving in a hold of this generation. `outcome`: one of `types.HOLD_OUTCOMES`."""

    worker: str
    generation: int
    outcome: str = SAVED


@dataclass(frozen=True, slots=True)
class Finished:
    """The worker did all steps of the run, or agreed to stop."""

    worker: str


@dataclass(frozen=True, slots=True)
class Left:
    """The worker ends because no view contains it any more."""

    worker: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The worker's connection has closed. Perhaps the worker has died, perhaps only the connection was cut."""

    worker: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker has died: its process was reported dead, or it says that it fails."""

    worker: str
    reason: str = "process died"


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node has died, with all its workers."""

    node: str
    reason: str = "node lost"


@dataclass(frozen=True, slots=True)
class Drain:
    """A worker, or all workers of a node, should hand over and leave within `deadline_s` seconds (0: the default)."""

    worker: str = ""
    node: str = ""
    deadline_s: float = 0.0
    reason: str = "drain"


@dataclass(frozen=True, slots=True)
class Stop:
    """The run should end after the step in flight."""

    reason: str = "stop"


@dataclass(frozen=True, slots=True)
class Fail:
    """The run cannot go on, whoever is there: it should end as failed once its members have saved their state."""

    reason: str = "fail"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of the newest step should be written."""

    reason: str = "checkpoint"


@dataclass(frozen=True, slots=True)
class Scale:
    """The run should go on with at most so many workers."""

    workers: int
    reason: str = "scale"


@dataclass(frozen=True, slots=True)
class SetPaused:
    """The run should make no step, with its state saved and kept; or it should go on."""

    paused: bool
    reason: str = "pause"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Hello
    | Ready
    | Heartbeat
    | Suspect
    | Links
    | Entered
    | Held
    | Finished
    | Left
    | Closed
    | Lost
    | NodeLost
    | Drain
    | Stop
    | Fail
    | Checkpoint
    | Scale
    | SetPaused
    | Tick
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """The worker is registered."""

    worker: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Send the view to `workers`. `cause` is one of `causes.CAUSES`, or "" for a view that was published before."""

    view: View
    planned: bool
    reason: str
    workers: tuple[str, ...]
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """Too few workers are left: the named ones keep their state and wait."""

    generation: int
    workers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """The members, which wait, save together what they hold. `view` has a generation of its own and no steps."""

    view: View
    reason: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the workers for a sign of life at once."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckLinks:
    """Ask the workers to try whether they reach the peers."""

    workers: tuple[str, ...]
    check: int
    peers: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The worker is not needed any more and may end itself."""

    worker: str


@dataclass(frozen=True, slots=True)
class Evict:
    """The worker is no member any more and must not touch the run; its connection is closed."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection of a worker that gives no sign. If it lives, it registers again, and is taken in again."""

    worker: str


@dataclass(frozen=True, slots=True)
class Save:
    """Ask the workers for a checkpoint of `step`, or of a later one."""

    workers: tuple[str, ...]
    step: int


@dataclass(frozen=True, slots=True)
class StopAll:
    """Ask the workers to stop after the step in flight."""

    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The run is over."""

    phase: str
    reason: str


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A line for the event log."""

    event: str
    worker: str = ""
    node: str = ""
    pid: int = 0
    reason: str = ""


Command = (
    Welcome
    | Publish
    | Pause
    | Hold
    | Probe
    | CheckLinks
    | Release
    | Evict
    | Disconnect
    | Save
    | StopAll
    | End
    | LogEvent
)
