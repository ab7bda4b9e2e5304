"""Partitions, resets, sleeps and kills in virtual time, with the real membership machine.

The workers are models: they obey messages, hold a lease on a clock of their own that drifts, and commit a step of a
view whenever all its members are in it, reach one another and may vote. In every schedule:

- a view commits no step after another view has committed one, so two groups never commit beside each other;
- after all is healed, the run goes on.

In a part of the schedules the coordinator is restarted too, without any memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby, product

import pytest

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control import events as ev
from elastic_moe.control.doubt import CLOCK_DRIFT
from elastic_moe.control.machine import initial_state, transition
from elastic_moe.control.state import State
from elastic_moe.types import View

STEP_S = 0.25  # virtual time between two looks at everybody
CONFIG = ElasticConfig(
    heartbeat_s=0.25, heartbeat_timeout_s=2.0, lease_s=6.0, hang_timeout_s=12.0, join_settle_s=0.5, max_workers=4
)


@dataclass
class ModelWorker:
    """One worker process: what it knows, and whether it can do anything."""

    name: str
    rate: float  # of its clock
    alive: bool = True
    asleep: bool = False
    registered: bool = False  # it has a connection on which it said hello
    newest: View | None = None
    current: View | None = None  # it trains in this view
    entered: int = 0
    over: int = 0  # it enters no view up to this generation any more
    step: int = 0
    heard_s: float = -1e9
    lapsed: int = 0  # view in which its lease has run out
    released: bool = False

    @property
    def runs(self) -> bool:
        return self.alive and not self.asleep and not self.released


@dataclass
class World:
    """Coordinator, workers and links in virtual time."""

    rng: random.Random
    now_s: float = 100.0
    state: State = field(default_factory=lambda: initial_state(3))
    workers: dict[str, ModelWorker] = field(default_factory=dict)
    cut: set[frozenset[str]] = field(default_factory=set)  # pairs that cannot reach each other; "" is the coordinator
    commits: list[tuple[float, int, tuple[str, ...]]] = field(default_factory=list)
    restarts: float = 0.0  # share of restarts of the coordinator among all mischief

    def start_worker(self) -> None:
        name = f"w{len(self.workers)}"
        drift = self.rng.uniform(1 / CLOCK_DRIFT, CLOCK_DRIFT)
        self.workers[name] = ModelWorker(name, drift)

    def copy(self) -> World:
        """The same world, which goes its own way from here."""
        rng = random.Random()
        rng.setstate(self.rng.getstate())
        workers = {name: replace(worker) for name, worker in self.workers.items()}
        return replace(self, rng=rng, workers=workers, cut=set(self.cut), commits=list(self.commits))

    def reaches(self, a: str, b: str) -> bool:
        return frozenset((a, b)) not in self.cut

    def tell(self, event: ev.Event) -> None:
        self.state, commands, _ = transition(self.state, event, self.now_s, CONFIG)
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Publish(view, planned, _, recipients, _):
                for worker in self._heard_by(recipients):
                    if view.rank_of(worker.name) is not None:
                        worker.newest = view
                    if not planned:
                        worker.over = max(worker.over, view.generation - 1)
                    if worker.current is not None and worker.current.generation <= worker.over:
                        worker.current = None
            case ev.Pause(generation, recipients):
                for worker in self._heard_by(recipients):
                    worker.over = max(worker.over, generation)
                    if worker.current is not None and worker.current.generation <= generation:
                        worker.current = None
            case ev.Release(name) | ev.Evict(name):
                for worker in self._heard_by((name,)):
                    worker.released, worker.current = True, None
            case ev.Disconnect(name):
                self.workers[name].registered = False
            case _:
                pass

    def _heard_by(self, names: tuple[str, ...]) -> list[ModelWorker]:
        """Those of the workers that a message reaches now."""
        return [w for n in names if (w := self.workers[n]).runs and w.registered and self.reaches(n, "")]

    def look(self) -> None:
        """Let a little time pass for everybody."""
        self.now_s += STEP_S
        order = list(self.workers.values())
        self.rng.shuffle(order)
        for worker in order:
            if worker.runs and self.reaches(worker.name, ""):
                self._talk(worker)
        self.tell(ev.Tick())
        for worker in order:
            self._enter(worker)
        self._commit()

    def _talk(self, worker: ModelWorker) -> None:
        sent_s = self.now_s - self.rng.uniform(0.0, STEP_S)
        if not worker.registered:
            worker.registered = True
            known = worker.newest.generation if worker.newest is not None else 0
            if (self.now_s - worker.heard_s) * worker.rate > CONFIG.lease_s:
                worker.lapsed = known
            hello = ev.Hello(worker.name, f"n-{worker.name}", 1, 0, True, worker.newest, worker.entered)
            self.tell(replace(hello, step=max(0, worker.step - 1), lapsed=worker.lapsed == known > 0))
        if worker.released or not worker.registered:
            return
        generation = worker.current.generation if worker.current else 0
        self.tell(ev.Heartbeat(worker.name, generation, worker.step + 1, worker.step))
        if worker.name in self.state.records:
            worker.heard_s = max(worker.heard_s, sent_s)

    def _enter(self, worker: ModelWorker) -> None:
        """Enter the newest view once all its members can: they know it, and reach one another."""
        view = worker.newest
        if view is None or not worker.runs or view.generation <= max(worker.entered, worker.over):
            return
        members = [self.workers[m.worker] for m in view.members]
        ready = all(m.runs and m.newest == view and m.over < view.generation for m in members)
        if not ready or not self._connected(members):
            return
        step = max(m.step for m in members)
        for member in members:
            member.current, member.entered, member.step = view, view.generation, step
            if member.registered and self.reaches(member.name, ""):
                self.tell(ev.Entered(member.name, view.generation))

    def _connected(self, members: list[ModelWorker]) -> bool:
        return all(self.reaches(a.name, b.name) for a, b in combinations(members, 2))

    def _commit(self) -> None:
        views = {w.current.generation: w.current for w in self.workers.values() if w.runs and w.current is not None}
        for generation in sorted(views, reverse=True):
            members = [self.workers[m.worker] for m in views[generation].members]
            voting = all(m.runs and m.current is not None and m.current.generation == generation for m in members)
            leased = all((self.now_s - m.heard_s) * m.rate <= CONFIG.lease_s for m in members)
            if voting and leased and self._connected(members):
                for member in members:
                    member.step += 1
                self.commits.append((self.now_s, generation, tuple(m.name for m in members)))

    def returns(self) -> int:
        """Number of times that a view committed a step after another view had committed one since."""
        views = [view for (_, *view), _ in groupby(self.commits, key=lambda commit: (0, *commit[1:]))]
        return len(views) - len({tuple(view) for view in views})

    # --- mischief ---

    def disturb(self) -> None:
        """One failure or repair, drawn at random."""
        if self.rng.random() < self.restarts:
            self.restart()
            return
        living = [w.name for w in self.workers.values() if w.alive and not w.released]
        places = [*living, ""]
        match self.rng.choice(
            ["cut", "cut", "island", "heal", "heal", "reset", "sleep", "wake", "kill", "join", "new"]
        ):
            case "cut" if len(places) > 1:
                self.cut.add(frozenset(self.rng.sample(places, 2)))
            case "island":
                island = set(self.rng.sample(places, self.rng.randint(1, len(places))))
                self.cut |= {frozenset((a, b)) for a in island for b in set(places) - island}
            case "heal":
                self.cut = {pair for pair in self.cut if self.rng.random() < 0.5}
            case "reset":
                for name in living:
                    if self.rng.random() < 0.7 and self.workers[name].registered:
                        self.workers[name].registered = False
                        self.tell(ev.Closed(name))
            case "sleep" if living:
                for name in self.rng.sample(living, self.rng.randint(1, len(living))):
                    self.workers[name].asleep = True
            case "wake":
                self._wake()
            case "kill" if living:
                name = self.rng.choice(living)
                self.workers[name].alive = False
                self.tell(ev.Closed(name))
                if self.rng.random() < 0.5:
                    self.tell(ev.Lost(name))
            case "join" if len(living) < 5:
                self.start_worker()
            case _:
                pass

    def restart(self) -> None:
        """Another coordinator takes over. It knows nothing, and waits for a lease before it trusts that."""
        for worker in self.workers.values():
            worker.registered = False
        self.state = initial_state(3, self.now_s + CLOCK_DRIFT * CONFIG.lease_s)

    def _wake(self) -> None:
        for worker in self.workers.values():
            worker.asleep = False

    def heal(self) -> None:
        self.cut.clear()
        self._wake()


@pytest.mark.parametrize("restarts", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(60))
def test_two_groups_never_commit_beside_each_other(seed: int, restarts: float) -> None:
    world = World(random.Random(seed), restarts=restarts)
    for _ in range(3):
        world.start_worker()
    for _ in range(40):
        world.look()
    assert world.commits, "an undisturbed run commits"
    for _ in range(40):
        world.disturb()
        for _ in range(world.rng.choice([1, 2, 8, 40])):
            world.look()
    assert not world.state.over, world.state.reason
    assert not world.returns(), "a view committed after another one had"
    world.heal()
    world.start_worker()
    before = len(world.commits)
    for _ in range(1200):
        world.look()
    assert len(world.commits) > before, world.state


def test_without_the_lease_two_groups_do_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules above are able to find what the lease prevents."""
    monkeypatch.setattr("elastic_moe.control.rules.no_other_group_commits", lambda *_: True)

    def breaks(seed: int) -> bool:
        world = World(random.Random(seed))
        for _ in range(3):
            world.start_worker()
        for _ in range(40):
            world.disturb()
            for _ in range(world.rng.choice([1, 2, 8, 40])):
                world.look()
        return bool(world.returns())

    assert any(breaks(seed) for seed in range(200))


# --- every short schedule ---------------------------------------------------------------------------------------------

ACTIONS = ("cut", "part", "island", "swap", "heal", "reset", "sleep", "kill", "report", "join", "restart")
SHORT, MIDDLE, LONG = 1, 12, 34  # looks: at once; longer than a worker may be silent; longer than a lease and that
DEPTH = 3


def _act(world: World, action: str) -> None:
    """One action, always on the same workers: to the machine all workers are alike."""
    first, second = "w0", "w1"
    others = [name for name in world.workers if name != first]
    match action:
        case "cut":
            world.cut.add(frozenset((first, "")))
        case "part":
            world.cut.add(frozenset((first, second)))
        case "island":
            world.cut |= {frozenset((first, other)) for other in (*others, "")}
        case "swap":  # only the first reaches the coordinator, and the others reach one another
            world.cut = {frozenset((a, b)) for a in others for b in (first, "")}
        case "heal":
            world.heal()
        case "reset":
            for worker in world.workers.values():
                if worker.alive and worker.registered:
                    worker.registered = False
                    world.tell(ev.Closed(worker.name))
        case "sleep":
            world.workers[first].asleep = True
        case "kill" | "report":
            world.workers[second].alive = False
            world.tell(ev.Lost(second) if action == "report" else ev.Closed(second))
        case "join" if len(world.workers) < 5:
            world.start_worker()
        case "restart":
            world.restart()
        case _:
            pass


def _schedules(world: World, depth: int) -> Iterator[tuple[str, World]]:
    """Every schedule of so many actions, and what it leads to. After the last action the time is long."""
    if depth == 0:
        yield "", world
        return
    for action, looks in product(ACTIONS, (SHORT, MIDDLE, LONG) if depth > 1 else (LONG,)):
        after = world.copy()
        _act(after, action)
        for _ in range(looks):
            after.look()
        for rest, end in _schedules(after, depth - 1):
            yield f"{action} ({looks}); {rest}", end


def _begun(action: str, looks: int) -> World:
    """A run that trains, after a first action."""
    world = World(random.Random(1))
    for _ in range(3):
        world.start_worker()
    for _ in range(4):
        world.look()
    assert world.commits
    _act(world, action)
    for _ in range(looks):
        world.look()
    return world


@pytest.mark.parametrize("first", ACTIONS)
@pytest.mark.parametrize("looks", [SHORT, MIDDLE, LONG])
def test_every_short_schedule(first: str, looks: int) -> None:
    """No schedule of `DEPTH` actions lets two groups commit, and after each of `DEPTH - 1` the healed run goes on."""
    for schedule, end in _schedules(_begun(first, looks), DEPTH - 1):
        assert not end.returns(), f"two groups committed after {first} ({looks}); {schedule}"
    for schedule, end in _schedules(_begun(first, looks), DEPTH - 2):
        end.heal()
        end.start_worker()
        before = len(end.commits)
        for _ in range(1200):
            end.look()
            if len(end.commits) > before:
                break
        assert len(end.commits) > before, f"the run stands after {first} ({looks}); {schedule}: {end.state}"


def test_short_schedules_find_what_the_lease_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.control.rules.no_other_group_commits", lambda *_: True)
    assert any(end.returns() for _, end in _schedules(_begun("island", LONG), DEPTH - 1))
