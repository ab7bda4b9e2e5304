"""Starts a run and stays with it until it ends: data, cluster, coordinator, trainer, progress, Ctrl-C, summary.

The driver decides nothing, so it may be interrupted at any time. It shows the records that it reads from the
coordinator. The first Ctrl-C asks for a final checkpoint and a clean end, the second one ends the run at once.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from elastic_moe.actors.cluster import (
    check_reachable,
    max_workers,
    ray_session,
    resolve,
    resources_per_worker,
    start_workers,
)
from elastic_moe.actors.coordinator import Coordinator
from elastic_moe.actors.corpus_progress import CorpusProgress
from elastic_moe.actors.demand import Demand, EndlessWait, demand, patience
from elastic_moe.actors.identify import begin, changes, fingerprint_of, run_of
from elastic_moe.actors.kept import end_all
from elastic_moe.actors.link import (
    LAST_SAVE_MARGIN_S,
    NAMESPACE,
    OVER,
    CoordinatorLink,
    actor_name,
    start_name,
    this_node,
    train_names,
)
from elastic_moe.actors.operate import announced
from elastic_moe.actors.outcome import EXIT_FAILED, Ended, conclude
from elastic_moe.actors.progress import Progress
from elastic_moe.actors.ray_notices import shortened
from elastic_moe.actors.run_places import absolute, check_device, clear
from elastic_moe.actors.stop import Stop, signals
from elastic_moe.actors.take_over import TAKES_OVER, take_over
from elastic_moe.checkpoint.storage import probe, set_timeout
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.lease import Lease, confirm, lost, own
from elastic_moe.coordination.start import check_start, look
from elastic_moe.data.prepare import Prepared, default_cache_root, prepare
from elastic_moe.data.tokenizer import load_tokenizer, with_tokenizer
from elastic_moe.errors import CoordinatorLost, UserError, of_storage, reason_of
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.metrics.schema import units
from elastic_moe.metrics.sinks.tracker import Tracker, check_tracking
from elastic_moe.plan.batch_sizes import RunLength
from elastic_moe.run_dir import EVENTS, TOKENIZER, checkpoint_root, make_run_dir
from elastic_moe.run_log import RunLog

POLL_S = 0.5  # each look asks the coordinator, whose processor time is the workers' on a small machine
ASK_AGAIN_S = 5.0  # between two requests to stop: a coordinator that was just lost may not have heard the first
CLOSE_TIMEOUT_S = 60.0
HAND_OVER_S = 10.0  # for a start that has taken the directories over to ask the coordinator for the workers' state
STOPPING = "stopping: waiting for the final checkpoint (once more to end at once)"


def launch(config: TrainConfig, raw_yaml: str) -> int:
    """Run a training to its end; see `start`. Bad input is told in one sentence, and its exit code returned."""
    try:
        return start(config, raw_yaml)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if not of_storage(error):
            raise
        print(f"error: run.dir={config.run.dir} cannot be read or written: {error}", file=sys.stderr)
        return UserError.exit_code


def start(config: TrainConfig, raw_yaml: str) -> int:
    """Run a training to its end.

    Args:
        config: the validated configuration; it is not changed.
        raw_yaml: the configuration as the user gave it, kept in the run directory.

    Returns:
        Exit code: 0 when `run.steps` are committed, 130 after Ctrl-C, 143 after SIGTERM, else 1.

    Raises:
        UserError: bad input, exit code 2.
        StorageFailed: the last state could not be saved, or no state could be read; exit code 3.
    """
    config = resolve(config)
    config = absolute(config)
    check_device(config)
    check_tracking(config.tracking)
    set_timeout(config.checkpoint.timeout_s)
    check_start(config, look(config))
    check_reachable(config)
    make_run_dir(Path(config.run.dir))
    probe(checkpoint_root(config))
    with own(Path(config.run.dir), checkpoint_root(config)) as leases:
        return _launch_owned(config, raw_yaml, leases)


def _launch_owned(config: TrainConfig, raw_yaml: str, leases: Sequence[Lease]) -> int:
    """Compare the start with what the directories hold, begin it, and train; see `start`."""
    run_dir, found = Path(config.run.dir), look(config)
    check_start(config, found)
    resume = config.run.resume == "auto"
    run = run_of(found, resume)
    name = actor_name(run, str(found.run_dir), start_name())
    log = RunLog(config.run.log_format, train_names(name, str(run_dir)).name)
    with CorpusProgress(config.run.log_every_s, log) as shown:
        prepared = prepare(config.data, default_cache_root(config.data, run_dir), shown)
    if prepared.summary:
        log.tell(prepared.summary, event="corpus")
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    config = replace(config, model=with_tokenizer(config.model, tokenizer))
    if config.model.init_from:
        from elastic_moe.model.hf.checkpoint import HFCheckpoint  # it needs torch, which takes seconds to import

        HFCheckpoint(config.model.init_from, config.model)
    config.seal()
    new = fingerprint_of(config, prepared)
    changed = changes(found, new) if resume else ()
    # Ray Train takes seconds to import, and starting Ray is mostly waiting.
    threading.Thread(target=importlib.import_module, args=("elastic_moe.actors.fit",), daemon=True).start()
    with ray_session(config), signals() as stop:
        replaced = confirm(leases)  # here, where little is left that may fail
        if take_over(found) or replaced:
            found = look(config)
            check_start(config, found)
        if not resume:
            clear(found)
        begin(found, resume, run, new, changed, raw_yaml)
        tokenizer.save(run_dir / TOKENIZER)
        tracker = Tracker(config.tracking, run_dir, asdict(config) | {"units": units()}, os.environ)
        try:
            with announced(run_dir):
                return _Driver(name, config, prepared, stop, leases, log).run()
        finally:
            tracker.close()


def start_coordinator(config: TrainConfig, name: str, token: str, prepared: Prepared | None = None) -> Any:
    """Start the coordinator actor on this node, without waiting for it. Ray restarts it when it dies.

    Ray repeats calls that were not answered. It has to be on this node, where the run directory is. It is detached: it
    outlives this process, and then ends the run (`actors/driver_watcher.py`).
    """
    host = ray.util.get_node_ip_address() if config.cluster.kind == "address" else "127.0.0.1"
    return (
        ray.remote(Coordinator)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
            label_selector=this_node(),
        )
        .remote(config, token, _target(config), host, prepared, time.time())
    )


def _target(config: TrainConfig) -> int:
    """Number of workers that the run waits for before its first step."""
    return min(start_workers(config.cluster), max_workers(config), config.sweep.workers or max_workers(config))


@dataclass
class _Driver:
    """The driver's part of one run, whose coordinator actor has this name."""

    name: str
    config: TrainConfig
    prepared: Prepared
    stop: Stop
    leases: Sequence[Lease]
    log: RunLog
    error: BaseException | None = None
    last_step: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    trainer: Any = None

    def __post_init__(self) -> None:
        self._events = Tail(Path(self.config.run.dir) / EVENTS)
        self._shown = len(self._events.lines())  # a resumed run has shown these before

    def run(self) -> int:
        coordinator = start_coordinator(self.config, self.name, secrets.token_hex(16), self.prepared)
        training = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        training.start()
        try:
            ray.get(coordinator.address.remote())  # while the controller starts
        except RayError:
            self._end(coordinator)
            raise
        link = CoordinatorLink(self.name)
        waits = EndlessWait(self._demand, patience(self.config.cluster))
        asked_s, interrupted, taken = -ASK_AGAIN_S, False, ""
        try:
            run = self.config.run
            progress = Progress(RunLength.of(self.config), run.log_every_s, self._missing, log=self.log)
            with progress as shown, shortened(progress.line):
                while training.is_alive():
                    if taken := lost(self.leases):
                        break
                    if self.stop.count and time.monotonic() - asked_s >= ASK_AGAIN_S:
                        if asked_s < 0:
                            shown.line(STOPPING)
                        asked_s = time.monotonic()
                        link.submit({"event": "stop", "reason": signal.Signals(self.stop.signum).name})
                    self._show(coordinator, link, shown)
                    if (endless := waits.look(self.status) or self._gone(link)) is not None:
                        self.error = endless
                        break
                    training.join(POLL_S)
                if not taken:
                    self._show(coordinator, link, shown)
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:  # noqa: BLE001 - of this display: the run is not to end unsaved
            self.error = error
        if taken:
            return self._give_up(coordinator, link, taken)
        try:
            if not interrupted:
                self._save_last(link)
                training.join(CLOSE_TIMEOUT_S)  # else the controller would seem to have died
                self.status = ray.get(coordinator.status.remote(), timeout=CLOSE_TIMEOUT_S)
            ray.get(coordinator.close.remote(), timeout=CLOSE_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            self.log.tell(f"the coordinator did not end cleanly: {error}", "warning")
        self._end(coordinator)
        return conclude(Ended(self.config, self.stop, self.error, self.status, self.log))

    def _give_up(self, coordinator: Any, link: CoordinatorLink, taken: str) -> int:
        """Another start owns the directories: write nothing there, and end what is this start's. Returns the exit code.

        Where the other start is on this cluster, it lets this one's workers save their state, and ends them.
        """
        link.forget()
        deadline_s = time.monotonic() + HAND_OVER_S
        while not (handed_over := link.poll().get("reason") == TAKES_OVER or link.is_gone):
            if time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        if not handed_over:
            self._end(coordinator)
        self.log.tell(f"failed after step {self.last_step}: {taken}; nothing more was written there", "error")
        return EXIT_FAILED

    def _end(self, coordinator: Any) -> None:
        """End what is left of the run in Ray."""
        try:
            if self.trainer is not None and self.trainer.controller is not None:
                ray.kill(self.trainer.controller)  # where it still runs, it would start workers again
            end_all(self.name)
            ray.kill(coordinator)
        except Exception as error:  # noqa: BLE001 - Ray's head is away: the outcome is told all the same
            self.log.tell(f"what is left of the run in Ray could not be ended: {reason_of(error)}", "warning")

    def _fit(self) -> None:
        from elastic_moe.actors.fit import fit, make_trainer

        def make() -> Any:
            self.trainer = make_trainer(self.config, self.prepared, self.name)
            return self.trainer

        try:
            fit(make, CoordinatorLink(self.name), lambda text: self.log.tell(text, "warning"))
        except Exception as error:  # noqa: BLE001 - the main thread reports it
            self.error = self.error or error

    def _save_last(self, link: CoordinatorLink) -> None:
        """After an error that the coordinator has not heard of: let the members save their state before all ends."""
        if self.error is None or isinstance(self.error, CoordinatorLost):
            return
        deadline_s = time.monotonic() + self.config.elastic.hang_timeout_s + LAST_SAVE_MARGIN_S
        link.forget()
        link.submit({"event": "fail", "reason": reason_of(self.error)})
        while link.poll().get("phase") not in OVER and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def _gone(self, link: CoordinatorLink) -> CoordinatorLost | None:
        """An error if Ray has known no coordinator for as long as workers wait for one."""
        if not link.is_gone or link.silent_s <= self.config.elastic.hold_s:
            return None
        return CoordinatorLost(f"the run's coordinator is gone, and was not started again in {link.silent_s:.0f} s")

    def _missing(self) -> str:
        """What Ray lacks for the workers that are not there."""
        try:
            return self._demand().sentence()
        except Exception as error:  # noqa: BLE001 - a head that is busy or away must not end the run
            return f"Ray does not tell what is missing ({reason_of(error)})"

    def _demand(self) -> Demand:
        return demand(self.name, resources_per_worker(self.config.cluster))

    def _show(self, coordinator: Any, link: CoordinatorLink, shown: Progress) -> None:
        """Bring what is shown up to date. A coordinator that does not answer is asked again later."""
        events = self._events.lines()
        shown.events(events[self._shown :])
        self._shown = len(events)
        self.status = link.poll() or self.status
        shown.status(self.status)
        try:
            records = ray.get(coordinator.records_since.remote(self.last_step), timeout=2)
        except (RayError, TimeoutError):
            return
        if records:
            self.last_step = int(records[-1]["step"])
        shown.records(records)


__all__ = ["launch", "start", "start_coordinator"]
