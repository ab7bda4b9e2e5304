"""Adoption: a coordinator that was restarted takes over the view in which a worker registers with it."""

from __future__ import annotations

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Hello
from elastic_moe.control.frozen import replace
from elastic_moe.control.state import RUNNING, State, WorkerRecord

ADOPTION_GAP = 10  # generations left free after an adopted one: the lost coordinator may have published newer ones


def is_adoptable(state: State, event: Hello) -> bool:
    """Whether to take the worker's view over: this coordinator has published none, and knows no newer one."""
    if event.view is None or event.view.rank_of(event.worker) is None or event.lapsed:
        return False
    if state.view is None:
        return True
    return state.adopted_s is not None and event.view.generation > state.view.generation


def adopt(state: State, event: Hello, now_s: float, config: ElasticConfig) -> State:
    """Take a view over. A member that does not register is silent, and is evicted like any silent worker."""
    view = event.view
    assert view is not None
    records = {w: s for w, s in state.records.items() if not s.missing}
    for m in view.members:
        drain_s = now_s + config.drain_deadline_s if m.draining else None
        if m.worker in records:
            records[m.worker] = replace(records[m.worker], member=replace(m, draining=False), drain_s=drain_s)
        elif m.worker not in state.removed:
            records[m.worker] = WorkerRecord(
                replace(m, draining=False), now_s, now_s, (0, 0, 0), now_s, drain_s, missing=True
            )
    unheard = state.unheard.union(m.worker for m in view.members if m.worker in records and records[m.worker].missing)
    return replace(
        state,
        unheard=unheard,
        phase=RUNNING,
        reason=state.reason if state.stopping else "re-registered",
        records=records,
        view=view,
        open_views=(*state.open_views, view),
        generation=max(state.generation, view.generation + ADOPTION_GAP),
        entered=frozenset(),
        adopted_s=now_s,
        waiting_s=None,
    )
