"""Messages about membership, and requests, as the events that they are for the membership machine."""

from __future__ import annotations

from elastic_moe.control import events as ev
from elastic_moe.control.messages import (
    EnteredMessage,
    FailingMessage,
    FinishedMessage,
    HeartbeatMessage,
    HeldMessage,
    HelloMessage,
    LeftMessage,
    LinksMessage,
    ReadyMessage,
    SuspectMessage,
)
from elastic_moe.control.requests import (
    REQUEST_NAMES,
    CheckpointRequest,
    DrainRequest,
    FailRequest,
    NodeLostRequest,
    PauseRequest,
    Request,
    ResumeRequest,
    ScaleRequest,
    StopRequest,
    WorkerLostRequest,
)
from elastic_moe.types import Origin

MembershipMessage = (
    HelloMessage
    | ReadyMessage
    | HeartbeatMessage
    | SuspectMessage
    | EnteredMessage
    | HeldMessage
    | FinishedMessage
    | FailingMessage
    | LeftMessage
    | LinksMessage
)


def event_of_message(worker: str, message: MembershipMessage) -> ev.Event:
    """A message about a worker's membership, as the event that it is for the machine."""
    match message:
        case HelloMessage():
            m, on_spot = message, Origin(message.placed_s, message.node_kind).on_spot
            known = m.ready, m.view, m.entered, m.step, m.lapsed
            return ev.Hello(worker, m.node, m.pid, m.slots, *known, m.address, on_spot)
        case ReadyMessage():
            return ev.Ready(worker)
        case HeartbeatMessage(generation, step, progress):
            return ev.Heartbeat(worker, generation, step, progress)
        case SuspectMessage(generation, error):
            return ev.Suspect(worker, generation, error)
        case LinksMessage(check, reached, silent, refused):
            return ev.Links(worker, check, reached, silent, refused)
        case EnteredMessage(generation):
            return ev.Entered(worker, generation)
        case HeldMessage(generation, outcome):
            return ev.Held(worker, generation, outcome)
        case FinishedMessage():
            return ev.Finished(worker)
        case FailingMessage(error):
            return ev.Lost(worker, error)
        case LeftMessage():
            return ev.Left(worker)


def event_of_request(request: Request) -> ev.Event:
    """A request as the event that it is for the machine. A request without a reason gets its name as the reason."""
    reason = request.reason or REQUEST_NAMES[type(request)]
    match request:
        case DrainRequest(worker, node, deadline_s):
            return ev.Drain(worker, node, deadline_s, reason)
        case WorkerLostRequest(worker):
            return ev.Lost(worker, reason)
        case NodeLostRequest(node):
            return ev.NodeLost(node, reason)
        case StopRequest():
            return ev.Stop(reason)
        case FailRequest():
            return ev.Fail(reason)
        case CheckpointRequest():
            return ev.Checkpoint(reason)
        case ScaleRequest(workers):
            return ev.Scale(workers, reason)
        case PauseRequest() | ResumeRequest():
            return ev.SetPaused(isinstance(request, PauseRequest), reason)
