"""Runs the membership machine of one run: turns messages and requests into events, and carries commands out.

It knows no socket: `connections` sends a message to workers and closes a connection. It is not thread-safe; the thread
of `coordination/server.py` makes every call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control import events as ev
from elastic_moe.control import messages as msg
from elastic_moe.control.doubt import CLOCK_DRIFT
from elastic_moe.control.heartbeats import is_routine, repeats_suspicion, take_heartbeats
from elastic_moe.control.machine import initial_state, transition
from elastic_moe.control.message_events import event_of_message
from elastic_moe.control.state import FINISHING, State
from elastic_moe.coordination.event_log import EventLog, hand_over
from elastic_moe.coordination.newcomers import Facts, facts_of, objection
from elastic_moe.types import Origin

LONG_S = 0.002  # a longer run of the rules is followed by a rest
REST = 4.0  # times as long as that run
ANSWER_SHARE = 1 / 15  # of the lease, between two answers to a worker's heartbeats

Sink = Callable[[dict[str, Any]], object]


class Connections(Protocol):
    """The connections to the workers."""

    @property
    def store_address(self) -> tuple[str, int]:
        """Host and port of the store through which groups form."""
        ...

    @property
    def welcome(self) -> msg.WelcomeMessage:
        """What a worker is told when it has registered."""
        ...

    def send(self, workers: Sequence[str], message: msg.CoordinatorMessage) -> None:
        """Send to those of the workers that are connected."""
        ...

    def disconnect(self, worker: str) -> None:
        """Close a worker's connection after everything that was sent."""
        ...


class RunStatus(TypedDict):
    """The state of a run as plain values.

    Keys:
        step, steps: last recorded step, and steps of the run.
        loss, tokens_per_s: of the last recorded step; None before the first.
        world_size, generation: active members and number of the newest view; 0 before the first.
        phase, reason: "waiting", "running", "finished" or "failed", and why.
        workers: living workers, members or not.
        members: worker, node, pid and draining flag of the newest view's members, in rank order.
        entered: every active member has entered the newest view.
        evicted: evicted workers whose process is not known to be gone.
        limit: largest number of workers that an operator asked for; 0 if none did.
        paused: an operator asked for a pause.
    """

    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    world_size: int
    generation: int
    phase: str
    reason: str
    workers: int
    members: list[list[Any]]
    entered: bool
    evicted: list[str]
    limit: int
    paused: bool


class Membership:
    """The membership of one run.

    Args:
        config: the run's configuration.
        target: number of workers to start with.
        connections: the connections to the workers.
        on_record, on_event, on_shard: take a committed step's record, a line of the event log, and the report of a
            written checkpoint shard; each may raise OSError. `on_record` may return the step up to which all records
            are in the run's files: the workers then keep them no longer.
        restarted: another coordinator of this run was here before, and workers that it knew may live.
    """

    def __init__(
        self,
        config: TrainConfig,
        target: int,
        connections: Connections,
        on_record: Sink,
        on_event: Sink,
        on_shard: Sink,
        restarted: bool = False,
    ) -> None:
        self._config, self._steps = config.elastic, config.run.steps
        self._connections = connections
        self._on_record, self._on_shard = on_record, on_shard
        self._log = EventLog(on_event)
        fence_s = time.monotonic() + CLOCK_DRIFT * config.elastic.lease_s if restarted else 0.0
        slots_needed = config.model.num_experts if config.elastic.slots_per_worker else 0
        self._state: State = initial_state(target, fence_s, slots_needed)
        self._last_record: dict[str, Any] = {}
        self._recorded = -1  # the records up to this step are in the run's files, in the newest view; -1: not known
        self._evicted: dict[str, None] = {}  # in order
        self._facts: dict[str, Facts] = {}  # by worker
        self._origins: dict[str, Origin] = {}  # of workers that register now
        self._refused: set[str] = set()  # nodes that were told
        self._answered: dict[str, float] = {}  # worker -> when one of its heartbeats was answered last
        self._rested_s = 0.0  # until then no heartbeat alone makes the rules run again
        self._heard: dict[str, tuple[ev.Heartbeat, float]] = {}  # heartbeats since the last event, and when they came

    def refusal(self, hello: msg.HelloMessage) -> str:
        """Why a worker must not register, which is told once for each node; "" if it may."""
        if hello.view is not None:
            return ""
        living = [worker for worker in self._state.records if worker != hello.worker and worker in self._facts]
        bearers = [worker for worker in living if self._state.may_bear_state(worker)]
        facts = facts_of(hello)
        reason = objection(hello.node, facts, [self._facts[worker] for worker in bearers or living])
        if reason:
            self._tell_refused(hello.worker, hello.node, hello.pid, reason)
        return reason

    def _check_newcomers(self) -> None:
        """Turn newcomers away that registered before those who bear the state, and do not fit to them.

        A coordinator that was restarted may hear of the newcomers first.
        """
        bearers = [self._facts[w] for w in self._state.records if w in self._facts and self._state.may_bear_state(w)]
        for worker in [w for w in self._facts if w in self._state.records and not self._state.may_bear_state(w)]:
            member = self._state.records[worker].member
            if reason := objection(member.node, self._facts[worker], bearers):
                self._tell_refused(worker, member.node, member.pid, reason)
                self._carry_out(ev.Evict(worker, reason))
                self.observe(ev.Left(worker))

    def _tell_refused(self, worker: str, node: str, pid: int, reason: str) -> None:
        if node not in self._refused:
            self._refused.add(node)
            self._log.command(self._state, self._step, ev.LogEvent("worker_set_aside", worker, node, pid, reason))

    def receive(self, worker: str, message: msg.WorkerMessage) -> None:
        """Take in a message of a worker."""
        if worker not in self._state.records and not isinstance(message, msg.HelloMessage):
            return  # it was removed: nothing that it says counts until it registers again
        match message:
            case msg.RecordMessage(record):
                if record["step"] >= self._last_record.get("step", -1):
                    self._last_record = dict(record)
                recorded = hand_over(self._on_record, dict(record))
                # a view that is not entered may go back behind steps that were recorded
                self._recorded = recorded if isinstance(recorded, int) and self._state.all_entered else -1
            case msg.EventMessage(event):
                self._log.worker_event(self._state, self._step, worker, event)
            case msg.ShardMessage(shard):
                hand_over(self._on_shard, dict(shard) | {"worker": worker})
            case _:
                if isinstance(message, msg.HelloMessage):
                    self._origins[worker] = Origin(message.placed_s, message.node_kind)
                self._take(event_of_message(worker, message))
                self._origins.clear()
                if isinstance(message, msg.HeartbeatMessage) and worker in self._state.records:
                    self._answer(worker, message.sent_s)
                if isinstance(message, msg.HelloMessage):
                    self._registered(worker, facts_of(message))
                    if message.view is not None:
                        self._check_newcomers()
                if isinstance(message, msg.EnteredMessage):
                    self._log.entered(self._state, self._step, worker, message.generation, message.info or {})

    def _registered(self, worker: str, facts: Facts) -> None:
        """Note what a worker runs, and forget those that are gone. Its next heartbeat is answered at once."""
        self._facts[worker] = facts
        for gone in [known for known in self._facts if known not in self._state.records]:
            del self._facts[gone]
            self._answered.pop(gone, None)
        self._answered.pop(worker, None)

    def _answer(self, worker: str, sent_s: float) -> None:
        """Answer a heartbeat, if none was answered lately: what many answers cost is the largest part of the work."""
        now_s = time.monotonic()
        if now_s - self._answered.get(worker, -math.inf) >= ANSWER_SHARE * self._config.lease_s:
            self._answered[worker] = now_s
            self._connections.send((worker,), msg.AliveMessage(sent_s, self._recorded))

    def _take(self, event: ev.Event) -> None:
        """Take in the event of a message. A mere sign of life is kept for the next event or tick.

        Such is a heartbeat on which nothing waits. While the rules take long, because members are many, any heartbeat
        is: a thousand of them must not cost a thousand times the rules. And so is a suspicion that is known.
        """
        now_s = time.monotonic()
        if isinstance(event, ev.Suspect) and repeats_suspicion(self._state, event, now_s):
            beat, _ = self._heard.get(event.worker, (ev.Heartbeat(event.worker, 0, 0, 0), 0.0))
            self._heard[event.worker] = (beat, now_s)
        elif isinstance(event, ev.Heartbeat) and is_routine(self._state, event, now_s, now_s < self._rested_s):
            self._heard[event.worker] = (event, now_s)
        else:
            self.observe(event)

    def observe(self, event: ev.Event) -> None:
        """Let the machine decide, and carry its commands out."""
        if self._heard:
            self._state = take_heartbeats(self._state, self._heard)
            self._heard = {}
        started_s = time.monotonic()
        self._state, commands, _ = transition(self._state, event, started_s, self._config)
        now_s = time.monotonic()
        if now_s - started_s > LONG_S:
            self._rested_s = now_s + REST * (now_s - started_s)
        if isinstance(event, ev.Lost) or (isinstance(event, ev.Hello) and event.worker in self._state.records):
            self._evicted.pop(event.worker, None)
        for command in commands:
            self._carry_out(command)

    def status(self) -> RunStatus:
        """The state of the run; safe to call from any thread."""
        state, last = self._state, self._last_record
        view = state.view
        return {
            "step": self._step,
            "steps": self._steps,
            "loss": last.get("loss"),
            "world_size": len(view.active_ranks) if view else 0,
            "generation": view.generation if view else 0,
            "tokens_per_s": last.get("tokens_per_s"),
            "phase": "running" if state.phase == FINISHING else state.phase,
            "reason": state.reason,
            "workers": len(state.records),
            "members": [[m.worker, m.node, m.pid, m.draining] for m in view.members] if view else [],
            "entered": state.all_entered,
            "evicted": [w for w in self._evicted if self._is_given_up(w)],
            "limit": state.limit,
            "paused": state.paused,
        }

    def _is_given_up(self, worker: str) -> bool:
        """Whether an evicted worker may be killed: one that was only silent may come back while its lease lasts."""
        away = self._state.absent.get(worker)
        return away is None or worker in self._state.removed or time.monotonic() - away.since_s > self._config.lease_s

    @property
    def _step(self) -> int:
        return max(int(self._last_record.get("step", 0)), 0)

    def _carry_out(self, command: ev.Command) -> None:
        send = self._connections.send
        match command:
            case ev.Publish(view, planned, reason, workers, cause):
                self._recorded = -1
                send(workers, msg.ViewMessage(view, planned, reason, self._connections.store_address))
                if cause:  # else its member has only registered again
                    self._log.view_published(self._state, self._step, view, planned, reason, cause)
            case ev.Pause(generation, workers, reason):
                send(workers, msg.PauseMessage(generation, reason))
            case ev.Hold(view, reason):
                workers = [m.worker for m in view.members]
                send(workers, msg.ViewMessage(view, False, reason, self._connections.store_address, hold=True))
            case ev.Welcome(worker):
                send((worker,), self._connections.welcome)
            case ev.Probe(workers):
                send(workers, msg.ProbeMessage())
            case ev.CheckLinks(workers, check, peers):
                send(workers, msg.CheckLinksMessage(check, peers))
            case ev.Release(worker):
                send((worker,), msg.ReleaseMessage())
            case ev.Save(workers, step):
                send(workers, msg.SaveMessage(step))
            case ev.StopAll(workers):
                send(workers, msg.StopMessage())
            case ev.Evict(worker, reason):
                send((worker,), msg.EvictedMessage(reason))
                self._connections.disconnect(worker)
            case ev.Disconnect(worker):
                self._evicted[worker] = None
                self._connections.disconnect(worker)
            case ev.LogEvent(name, worker):
                if name == "worker_evicted":
                    self._evicted[worker] = None
                origin = self._origins.get(worker) if name in ("worker_connected", "worker_readmitted") else None
                self._log.command(self._state, self._step, command, origin)
            case ev.End():
                pass
