"""The end of a run, as a rule of membership: finished, stopped, or failed with the state of its members saved."""

from __future__ import annotations

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Command, End, LogEvent, Release
from elastic_moe.control.frozen import replace
from elastic_moe.control.holds import begin_hold, is_saving
from elastic_moe.control.state import FAILED, FINISHED, FINISHING, RUNNING, WAITING, State

FINISH_GRACE_S = 10.0  # after the first worker finished, wait this long for the others
MAX_REFORMS = 20  # views in a row that failed although everyone lived

RuleResult = tuple[State, list[Command], str]


def finish(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """End the run: finished, stopped before or between views, or failed.

    The first member that finishes has passed the last barrier, and so has every other one. Nothing is lost if one of
    them dies before its own report.
    """
    if state.phase == FINISHING:
        assert state.finishing_s is not None
        waiting = [w for w in state.view_workers if not state.records[w].finished]
        if waiting and now_s - state.finishing_s < FINISH_GRACE_S and state.suspected_s is None:
            return None
        return _end(state, FINISHED, state.reason if state.stopping else "all steps are committed")
    if state.reforms > MAX_REFORMS and not state.failing:
        state = replace(state, failing=f"{MAX_REFORMS} views in a row could not be entered")
    if state.phase == RUNNING and state.failing:
        state, commands = begin_hold(state, state.view_workers, state.failing, now_s, config)
        return state, commands, state.failing
    if state.phase == WAITING and (is_saving(state, now_s) or (state.view is None and now_s < state.fence_s)):
        return None  # in the second case the members of a coordinator before this one may still come, with their state
    if state.stopping and state.phase == WAITING:
        return _end(state, FINISHED, state.reason)
    if state.failing:
        return _end(state, FAILED, state.failing)
    waiting_s = None if state.paused or state.phase != WAITING else state.waiting_s
    if waiting_s is not None and now_s - waiting_s > config.wait_below_min_s:
        reason = f"{state.reason} for {config.wait_below_min_s:g} s (elastic.min_workers={config.min_workers})"
        return _end(state, FAILED, reason)
    return None


def _end(state: State, phase: str, reason: str) -> RuleResult:
    """End the run in this phase, and release every worker that has not finished."""
    releases: list[Command] = [Release(w) for w, record in state.records.items() if not record.finished]
    commands = [LogEvent(phase, reason=reason), *releases, End(phase, reason)]
    return replace(state, phase=phase, reason=reason), commands, reason
