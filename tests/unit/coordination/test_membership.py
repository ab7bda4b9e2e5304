"""Membership without sockets: messages in; messages, closed connections and log lines out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from elastic_moe.config.schema import ElasticConfig, RunConfig, TrainConfig
from elastic_moe.control import events as ev
from elastic_moe.control import messages as msg
from elastic_moe.control.state import State, WorkerRecord
from elastic_moe.coordination import membership
from elastic_moe.coordination.event_log import EventLog
from elastic_moe.coordination.membership import Membership
from elastic_moe.types import SAVED, Member, View

STORE = ("127.0.0.1", 7)


class Run:
    """A membership with connections that record."""

    def __init__(self, target: int, restarted: bool = False, **elastic: Any) -> None:
        self.sent: list[tuple[str, msg.CoordinatorMessage]] = []
        self.closed: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.shards: list[dict[str, Any]] = []
        config = TrainConfig(elastic=ElasticConfig(**elastic), run=RunConfig(steps=10))
        sinks = (self.records.append, self.events.append, self.shards.append)
        self.membership = Membership(config, target, self, *sinks, restarted)

    welcome = msg.WelcomeMessage(files=("10.0.0.1", 5), witness="mark")

    @property
    def store_address(self) -> tuple[str, int]:
        return STORE

    def send(self, workers: Sequence[str], message: msg.CoordinatorMessage) -> None:
        self.sent += [(worker, message) for worker in workers]

    def disconnect(self, worker: str) -> None:
        self.closed.append(worker)

    def join(self, *workers: str) -> None:
        for i, worker in enumerate(workers):
            self.membership.receive(worker, msg.HelloMessage("token", worker, f"n-{worker}", i))
            self.membership.receive(worker, msg.ReadyMessage())

    def enter(self, *workers: str, **info: Any) -> None:
        for worker in workers:
            generation = self.membership.status()["generation"]
            self.membership.receive(worker, msg.EnteredMessage(generation, info or None))

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def to(self, worker: str, kind: type) -> list[Any]:
        return [message for to, message in self.sent if to == worker and isinstance(message, kind)]


def test_a_view_is_sent_to_its_members_and_logged() -> None:
    run = Run(2)
    run.join("a", "b")
    assert run.to("a", msg.WelcomeMessage) == [run.welcome]
    (view,) = run.to("b", msg.ViewMessage)
    assert [m.worker for m in view.view.members] == ["a", "b"]
    assert (view.planned, view.reason, view.store) == (True, "start", STORE)
    (line,) = [e for e in run.events if e["event"] == "view"]
    assert (line["generation"], line["step"], line["members"], line["world_size"]) == (1, 0, ["a", "b"], 2)


def test_only_the_first_active_rank_gives_the_line_that_the_view_is_entered() -> None:
    run = Run(2)
    run.join("a", "b")
    run.enter("b", source="peers")
    assert "entered" not in run.names()
    run.enter("a", source="checkpoint", step=5)
    (line,) = [e for e in run.events if e["event"] == "entered"]
    assert (line["worker"], line["node"], line["pid"], line["world_size"]) == ("a", "n-a", 0, 2)
    assert (line["source"], line["step"]) == ("checkpoint", 5)
    assert line["total_s"] >= 0
    assert run.membership.status()["entered"]


def test_a_late_report_of_an_older_view_gives_its_line_once() -> None:
    """It may be the only one that tells that the run went back to storage. The next view goes on from there."""
    run = Run(2)
    run.join("a", "b")
    run.membership.observe(ev.Lost("b"))
    late = msg.EnteredMessage(1, {"source": "checkpoint", "step": 5})
    run.membership.receive("a", late)
    assert not run.membership.status()["entered"]
    run.membership.receive("a", msg.EnteredMessage(2, {"source": "peers", "step": 5}))
    run.membership.receive("a", late)  # on a new connection
    lines = [event for event in run.events if event["event"] == "entered"]
    assert [(e["generation"], e["source"], e["world_size"]) for e in lines] == [(1, "checkpoint", 2), (2, "peers", 1)]
    assert run.membership.status()["entered"]


def test_an_evicted_worker_is_told_and_cut_and_listed_until_its_process_is_gone() -> None:
    run = Run(2, drain_deadline_s=30.0)
    run.join("a", "b")
    run.enter("a", "b")
    run.membership.observe(ev.Drain("b", deadline_s=1e-9))
    run.membership.observe(ev.Tick())
    (evicted,) = run.to("b", msg.EvictedMessage)
    assert evicted.reason == "drain deadline passed"
    assert run.closed == ["b"]
    assert run.membership.status()["evicted"] == ["b"]
    run.membership.observe(ev.Lost("b"))
    assert run.membership.status()["evicted"] == []


def test_too_few_workers_pause_and_a_stop_reaches_all() -> None:
    run = Run(2, min_workers=2)
    run.join("a", "b")
    run.enter("a", "b")
    run.membership.observe(ev.Lost("b"))
    (pause,) = run.to("a", msg.PauseMessage)
    assert pause.generation == 1
    assert "waiting for elastic.min_workers=2" in pause.reason
    assert (run.membership.status()["phase"], run.names()[-1]) == ("waiting", "pause")
    run.membership.observe(ev.Stop("enough"))
    assert run.to("a", msg.StopMessage) == [msg.StopMessage()]
    assert run.membership.status()["phase"] == "waiting", "the member that is left saves first"
    hold = run.to("a", msg.ViewMessage)[-1]
    assert hold.hold
    run.membership.receive("a", msg.HeldMessage(hold.view.generation, SAVED))
    assert run.membership.status()["phase"] == "finished"


def test_a_suspicion_probes() -> None:
    run = Run(2)
    run.join("a", "b")
    run.enter("a", "b")
    run.membership.receive("a", msg.SuspectMessage(1, "connection reset"))
    assert run.to("b", msg.ProbeMessage) == [msg.ProbeMessage()]


def test_many_suspicions_of_one_view_are_one_line_and_signs_of_life() -> None:
    run = Run(3)
    run.join("a", "b", "c")
    run.enter("a", "b", "c")
    before = {worker: record.last_heard_s for worker, record in run.membership._state.records.items()}
    for worker in ("a", "b", "c", "b"):
        run.membership.receive(worker, msg.SuspectMessage(1, "reset"))
    run.membership.observe(ev.Tick())
    assert [(e["event"], e["worker"]) for e in run.events if e["event"] == "suspect"] == [("suspect", "a")]
    assert all(record.last_heard_s > before[worker] for worker, record in run.membership._state.records.items())


def test_a_long_run_of_the_rules_is_followed_by_a_rest_from_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(3)
    run.join("a", "b", "c")
    run.enter("a", "b", "c")
    ran: list[str] = []

    def counted(state: State, event: ev.Event, now_s: float, config: ElasticConfig) -> Any:
        ran.append(type(event).__name__)
        return transition(state, event, now_s, config)

    transition = membership.transition
    monkeypatch.setattr(membership, "transition", counted)
    monkeypatch.setattr(membership, "LONG_S", -1.0)
    monkeypatch.setattr(membership, "REST", 1e9)
    run.membership.receive("a", msg.SuspectMessage(1, "reset"))
    for worker in ("a", "b", "c") * 5:
        run.membership.receive(worker, msg.HeartbeatMessage(1, 4, 4))
    assert ran == ["Suspect"], "heartbeats that are waited for"
    run.membership.receive("c", msg.FinishedMessage())
    assert ran == ["Suspect", "Finished"]
    assert {record.last_progress for record in run.membership._state.records.values()} == {(1, 4, 4)}


def test_records_give_the_status_and_the_step_of_every_line() -> None:
    run = Run(1)
    run.join("a")
    run.membership.receive("a", msg.RecordMessage({"step": 4, "loss": 2.5, "tokens_per_s": 100.0}))
    run.membership.receive("a", msg.RecordMessage({"step": 3, "loss": 9.0}))  # sent again, and older
    assert [record["step"] for record in run.records] == [4, 3]
    status = run.membership.status()
    assert (status["step"], status["loss"], status["tokens_per_s"], status["steps"]) == (4, 2.5, 100.0, 10)
    run.membership.receive("a", msg.EventMessage({"event": "evaluated", "val_loss": 1.0}))
    assert {"event": "evaluated", "worker": "a", "node": "n-a", "step": 4, "val_loss": 1.0}.items() <= run.events[
        -1
    ].items()


def test_a_workers_heartbeats_are_answered_now_and_then_and_at_once_after_a_hello() -> None:
    run = Run(1, lease_s=1e6)

    def answers() -> list[float]:
        return [message.sent_s for message in run.to("a", msg.AliveMessage)]

    run.join("a")
    for sent_s in (1.0, 2.0, 3.0):
        run.membership.receive("a", msg.HeartbeatMessage(1, 1, 1, sent_s))
    assert answers() == [1.0]
    run.join("a")
    run.membership.receive("a", msg.HeartbeatMessage(1, 1, 1, 4.0))
    assert answers() == [1.0, 4.0]


def test_heartbeats_are_told_how_far_the_records_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a view is entered, since it may go back behind steps that were recorded."""
    monkeypatch.setattr(membership, "ANSWER_SHARE", 0.0)
    run = Run(2)

    def told() -> int:
        run.membership.receive("b", msg.HeartbeatMessage(1, 1, 1, 5.0))
        return run.to("b", msg.AliveMessage)[-1].recorded

    def record(step: int) -> int:
        run.membership.receive("a", msg.RecordMessage({"step": step}))
        return told()

    run.membership._on_record = lambda record: record["step"] - 1
    run.join("a", "b")
    run.enter("a")
    assert record(7) == -1
    run.enter("b")
    assert told() == -1
    assert record(8) == 7
    run.membership._on_record = lambda record: None  # a sink that does not know
    assert record(9) == -1
    run.membership._on_record = lambda record: record["step"]
    assert record(10) == 10
    run.membership.receive("a", msg.SuspectMessage(1, "reset"))
    run.membership.observe(ev.Lost("a", "killed"))
    assert told() == -1


def test_a_shard_report_names_its_worker() -> None:
    run = Run(1)
    run.join("a")
    run.membership.receive("a", msg.ShardMessage({"step": 5, "file": "f"}))
    assert run.shards == [{"step": 5, "file": "f", "worker": "a"}]


def test_a_full_disk_stops_the_log_and_not_the_run() -> None:
    run = Run(1)

    def full(_: dict[str, Any]) -> None:
        raise OSError("no space left on device")

    run.membership = Membership(TrainConfig(), 1, run, full, full, full)
    run.join("a")
    run.enter("a")
    run.membership.receive("a", msg.RecordMessage({"step": 1}))
    run.membership.receive("a", msg.ShardMessage({"step": 1}))
    assert run.membership.status()["step"] == 1
    assert run.membership.status()["phase"] == "running"


@pytest.mark.parametrize("published", [True, False])
def test_the_time_until_a_view_is_entered_counts_from_its_publication_or_from_the_start(published: bool) -> None:
    view = View(3, (Member("a", "n", 1),))
    state = State(1, records={"a": WorkerRecord(view.members[0])}, view=view, generation=3)
    lines: list[dict[str, Any]] = []
    now_s = [100.0]
    log = EventLog(lines.append, clock=lambda: 5.0, monotonic=lambda: now_s[0])
    now_s[0] = 110.0
    if published:
        log.view_published(state, 0, view, True, "start", "start")
    now_s[0] = 112.0
    log.entered(state, 0, "a", 3, {})
    assert lines[-1]["total_s"] == (2.0 if published else 12.0)
    assert lines[-1]["time"] == 5.0


def test_views_that_nobody_enters_are_forgotten() -> None:
    lines: list[dict[str, Any]] = []
    log = EventLog(lines.append)
    members = (Member("a", "n", 1),)
    for generation in range(1, 200):
        view = View(generation, members)
        state = State(1, records={"a": WorkerRecord(members[0])}, view=view, generation=generation)
        log.view_published(state, 0, view, False, "death", "death")
    assert len(log._views) < 50
    log.entered(state, 0, "a", 198, {})
    log.entered(state, 0, "a", 199, {})
    assert [line["generation"] for line in lines if line["event"] == "entered"] == [198, 199], "the latest still count"


def _hello(worker: str, sources: str, device: str, view: View | None = None) -> msg.HelloMessage:
    entered = view.generation if view is not None else 0
    return msg.HelloMessage(
        "token", worker, f"n-{worker}", 1, ready=True, view=view, entered=entered, sources=sources, updates_on=device
    )


@pytest.mark.parametrize("odd", [("new", "cpu"), ("old", "cuda")])
def test_newcomers_that_a_new_coordinator_hears_first_must_fit_to_the_old_members(odd: tuple[str, str]) -> None:
    run = Run(2, restarted=True)
    view = View(7, (Member("a", "n-a", 1), Member("b", "n-b", 1)))
    hellos = [_hello("x", *odd), _hello("y", "", ""), _hello("a", "old", "cpu", view), _hello("b", "old", "cpu", view)]
    for hello in hellos:
        assert not run.membership.refusal(hello)
        run.membership.receive(hello.worker, hello)
    (evicted,) = run.to("x", msg.EvictedMessage)
    assert "node n-x" in evicted.reason
    assert run.closed == ["x"]
    assert [event["worker"] for event in run.events if event["event"] == "worker_set_aside"] == ["x"]
    assert list(run.membership._state.records) == ["y", "a", "b"]
    assert run.membership.refusal(_hello("z", *odd)), "the next one"
    assert not run.membership.refusal(_hello("z", "old", "cpu"))


def test_newcomers_that_fit_to_others_without_state_but_not_to_the_members_are_refused() -> None:
    run = Run(3, restarted=True)
    view = View(7, (Member("a", "n-a", 1),))
    for hello in (_hello("a", "old", "cpu", view), _hello("b", "new", "cpu", View(3, (Member("b", "n-b", 1),)))):
        run.membership.receive(hello.worker, hello)  # both may bear state
    assert not run.membership.refusal(_hello("c", "new", "cpu"))
    run.membership.observe(ev.Lost("b"))
    assert run.membership.refusal(_hello("c", "new", "cpu"))
