"""Runs the trials of one batch to their ends: starts them, moves workers between them, ends those that are behind.

The decisions are pure (`pool.py`, `halving.py`). A trial is told its number of workers as an operator would tell it
(`elastic-moe ctl RUN scale`). One that fails is started again, and goes on from its checkpoint.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from elastic_moe.actors.outcome import SIGNALLED
from elastic_moe.actors.shared import room
from elastic_moe.actors.stop import Stop, signals
from elastic_moe.config.schema import ClusterConfig, SweepConfig
from elastic_moe.sweep.gains import Gains
from elastic_moe.sweep.halving import Rungs, due, rungs_of
from elastic_moe.sweep.pool import Steady, Want, allocate
from elastic_moe.sweep.trial import (
    DONE,
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    STOPPED_EARLY,
    TrialFailed,
    last_step,
    objectives,
)
from elastic_moe.sweep.trials import Trial

POLL_S = 0.5
SETTLE_S = 20.0  # what others take from the cluster, and a node that is away, count after so long
GIVE_WAY_S = 30.0  # a trial for which there is no room ends after so long
KILL_S = 30.0  # after a second signal, a process is waited for so long
ASK_AGAIN_S = 5.0  # a coordinator that was just lost may not have heard it
COMPARE_S = 2.0  # between two looks at the files of a trial that is at a rung
BAD_INPUT = 2  # exit code; another start would end the same way


@dataclass(frozen=True)
class Shared:
    """The cluster that the trials share.

    Attributes:
        cluster: its configuration, the kind decided.
        sweep: the keys `sweep.*` that concern all trials.
        address: where trials join it; "" where they find it by their own configuration.
    """

    cluster: ClusterConfig
    sweep: SweepConfig
    address: str


class Scheduler:
    """One batch.

    Args:
        trials: those with a result have ended already.
        shared: their cluster; None where none of them is a run of elastic_moe.
        rungs: of the sweep, likewise.
        gains: what the sweep knows of the trials' speed.
        job: see `Trial.start`.
        folder: for the files of the processes.
        tell: shows a line.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        shared: Shared | None,
        rungs: Rungs | None,
        gains: Gains,
        job: Mapping[str, Any],
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._trials, self._shared, self._rungs, self._gains = trials, shared, rungs, gains
        self._job, self._folder, self._tell = job, folder, tell
        self._steady = Steady(SETTLE_S)
        self._capacity = 0
        for trial in trials:
            self._compare(trial, judge=False)

    def run(self) -> int:
        """Run all trials. Returns the signal that has ended the sweep, or 0."""
        with signals() as stop:
            forwarded = 0
            try:
                while open_trials := [trial for trial in self._trials if trial.returned is None]:
                    if stop.count > forwarded:
                        forwarded = stop.count
                        self._stop(stop)
                    for trial in open_trials:
                        self._look(trial, stop)
                    if not stop.count:
                        self._share([trial for trial in open_trials if trial.returned is None])
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                self._stop(stop)
            except Exception:
                self._stop(Stop(signal.SIGTERM, 1))
                raise
            finally:
                for trial in self._trials:
                    if trial.process is not None:
                        trial.process.end(KILL_S)
                        self._look(trial, stop)
        return stop.signum if stop.count else 0

    def _stop(self, stop: Stop) -> None:
        """Hand a signal on to all processes. Trials that have none have ended with that."""
        running = [trial for trial in self._trials if trial.process is not None]
        self._tell(f"stopping: {len(running)} trials save their state (once more to end at once)")
        for trial in self._trials:
            if trial.process is not None:
                trial.process.signal(stop.signum or signal.SIGTERM)
            elif trial.returned is None:
                trial.returned = trial.failed("the sweep was stopped before it", 128 + stop.signum)

    def _look(self, trial: Trial, stop: Stop) -> None:
        """Bring what is known of a trial up to date."""
        if trial.process is None:
            return
        code = trial.process.code()
        if code is not None:
            self._ended(trial, code, stop)
            return
        trial.poll()
        self._compare(trial)
        reason = trial.ends_early or ("workers are needed for other trials" if trial.gives_way else "")
        if reason and time.monotonic() - trial.asked_s >= ASK_AGAIN_S:
            trial.asked_s = time.monotonic()
            trial.ask_to_stop(reason)

    def _compare(self, trial: Trial, judge: bool = True) -> None:
        """Compare a trial with others where it has come to a rung."""
        config, rungs = trial.typed, self._rungs
        if config is None or rungs is None or config.sweep.early_stopping == "off" or trial.ends_early:
            return
        step = int(trial.status.get("step", 0)) if judge else trial.farthest
        all_rungs = rungs_of(config.run.steps, config.sweep.rung_steps, config.sweep.rung_factor)
        new = [rung for rung in all_rungs if rung <= step and not rungs.knows(trial.number, rung)]
        if not new or time.monotonic() - trial.compared_s < COMPARE_S:
            return
        trial.compared_s = time.monotonic()
        for rung, value in due(new, objectives(trial.run_dir, config.run.objective)):
            rungs.note(trial.number, rung, value)
            reason = rungs.behind(trial.number, rung) if judge else ""
            if reason:
                trial.ends_early = reason
                self._tell(f"{trial.title} ends early: {reason}")
                return

    def _share(self, trials: Sequence[Trial]) -> None:
        """Give the workers of the cluster to the trials."""
        limit = self._shared.sweep.max_concurrent if self._shared is not None else self._other_limit()
        staying = [trial for trial in trials if not trial.ends_early and not trial.gives_way]
        leaving = sum(trial.held for trial in trials if trial.process is not None and trial not in staying)
        training = [trial.look for trial in staying if trial.process is not None and trial.typed is not None]
        for line in self._gains.look(training, time.monotonic()):
            self._tell(line)
        given = allocate(map(self._want, staying), max(0, self._room() - leaving), limit)
        for trial in staying:
            workers = given[trial.number]
            if trial.process is not None and not workers:
                self._no_room(trial)
                continue
            trial.no_room_since_s = None
            if workers == trial.allowed:
                continue
            before, trial.allowed = trial.allowed, workers
            if trial.process is None:
                self._start(trial)
            elif trial.typed is not None:
                self._tell(f"trial {trial.number}: {before} -> {workers} workers")
                trial.poll()

    def _want(self, trial: Trial) -> Want:
        """Its claim on the pool, and no more workers than make it faster."""
        want = trial.want
        return replace(want, most=max(want.least, self._gains.most(trial.look, want.most)))

    def _other_limit(self) -> int:
        """Jobs of another program at once: its own `sweep.max_concurrent`, if it has one."""
        return int(OmegaConf.select(self._trials[0].config, "sweep.max_concurrent", default=0) or 0)

    def _room(self) -> int:
        """Workers for which there is room."""
        if self._shared is None:
            return os.cpu_count() or 1
        if self._shared.sweep.max_workers:
            return self._shared.sweep.max_workers
        if (found := room(self._shared.cluster)) is not None:
            total, free = found
            others = max(0, total - free - sum(trial.held for trial in self._trials))
            self._capacity = self._steady.take(total - others, time.monotonic())
        return self._capacity

    def _no_room(self, trial: Trial) -> None:
        """A trial that trains, and that there is no room for any more, ends after a while, and is started again."""
        now_s = time.monotonic()
        trial.no_room_since_s = now_s if trial.no_room_since_s is None else trial.no_room_since_s
        trial.allowed = trial.want.least
        if now_s - trial.no_room_since_s > GIVE_WAY_S:
            trial.gives_way = True
            self._tell(f"{trial.title} gives way: its workers are needed for other trials, or are gone")

    def _start(self, trial: Trial) -> None:
        if trial.typed is not None:
            again = f", again after step {trial.farthest}" if trial.record.starts else ""
            self._tell(f"{trial.title} starts with {trial.allowed} workers{again}")
        trial.start(self._job, self._folder / f"{trial.number}.job")
        trial.record = replace(trial.record, state=RUNNING, starts=trial.record.starts + 1, code=0, reason="")
        self._keep(trial)

    def _ended(self, trial: Trial, code: int, stop: Stop) -> None:
        """A process has ended: the trial has a result, or is started again."""
        assert trial.process is not None
        result = trial.process.result()
        trial.process, trial.allowed, trial.no_room_since_s = None, 0, None
        if trial.typed is None:
            failed = trial.failed(f"its process ended with exit code {code}", code or 1)
            trial.returned = result if result is not None else failed
            return
        step, steps = last_step(trial.run_dir), trial.typed.run.steps
        state, reason = self._outcome(trial, code, result, step)
        trial.failures = 0 if step > trial.farthest else trial.failures
        trial.farthest = max(trial.farthest, step)
        value = _finite(objectives(trial.run_dir, trial.typed.run.objective))
        seconds = trial.record.seconds + time.monotonic() - trial.began_s
        done = state in DONE
        code = 0 if done else _code(code, result)
        if stop.count and code >= SIGNALLED:
            state, reason = INTERRUPTED, "the sweep was stopped"
        trial.record = replace(
            trial.record, state=state, reason=reason, code=code, step=step, steps=steps, objective=value,
            seconds=round(seconds, 1),
        )  # fmt: skip
        if trial.gives_way and not done and not stop.count:
            trial.gives_way = False  # it wants workers again, as one that waits
            self._tell(f"{trial.title} waits after step {step}")
        elif state != FAILED or stop.count:
            self._conclude(trial, done or not code)
        elif code == BAD_INPUT or trial.failures >= trial.typed.sweep.retries:
            self._conclude(trial, False)
        else:
            trial.failures += 1
            self._tell(f"{trial.title} failed after step {step} ({reason}), and is started again")
        self._keep(trial)

    def _outcome(self, trial: Trial, code: int, result: Any, step: int) -> tuple[str, str]:
        """State and reason of a run whose driver has ended."""
        assert trial.typed is not None
        if result is not None and result.status == JobStatus.COMPLETED:
            if step >= trial.typed.run.steps:
                return FINISHED, ""
            return (STOPPED_EARLY, trial.ends_early) if trial.ends_early else (INTERRUPTED, "stopped before its end")
        if result is not None:
            error = result._return_value
            return FAILED, str(error) or repr(error)
        return FAILED, f"its driver ended with exit code {code}; see logs/driver.log in its directory"

    def _conclude(self, trial: Trial, good: bool) -> None:
        """The trial has ended for good."""
        record = trial.record
        if good:
            trial.returned = trial.returns(JobStatus.COMPLETED, record.objective)
        else:
            trial.returned = trial.failed(record.reason, record.code or 1)
        told = f": {record.reason}" if record.reason else ""
        self._tell(f"trial {trial.number} {record.state} after step {record.step}{told}")

    def _keep(self, trial: Trial) -> None:
        """Write the record of a trial; a directory that cannot be written costs a rerun its knowledge only."""
        if trial.typed is None:
            return
        try:
            trial.record.write(trial.run_dir)
        except OSError as error:
            self._tell(f"trial.json of trial {trial.number} cannot be written: {error}")


def _code(code: int, result: JobReturn | None) -> int:
    """Exit code of a run: that of its process, or the one that its failure names."""
    error = result._return_value if result is not None else None
    return error.code if isinstance(error, TrialFailed) else code


def _finite(values: Sequence[tuple[int, float]]) -> float | None:
    value = values[-1][1] if values else None
    return value if value is not None and math.isfinite(value) else None
