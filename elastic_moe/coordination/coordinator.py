"""The coordinator of one run without Ray: membership, records, checkpoints, and the roll back when state was lost.

`actors/coordinator.py` makes a Ray actor of it. All of it that must outlive its process is in the run directory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_moe.checkpoint.storage import set_timeout
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.codec import decode_request
from elastic_moe.control.messages import WORKER_LOG, WelcomeMessage
from elastic_moe.coordination.checkpoints import CheckpointCommitter
from elastic_moe.coordination.file_server import FileServer
from elastic_moe.coordination.identity import IdentityFiles
from elastic_moe.coordination.membership import RunStatus
from elastic_moe.coordination.records import StepRecords
from elastic_moe.coordination.save_steps import SaveSteps
from elastic_moe.coordination.served_places import served_places, witness
from elastic_moe.coordination.server import ControlServer
from elastic_moe.coordination.wishes import Wishes
from elastic_moe.coordination.worker_logs import WorkerLogs
from elastic_moe.data.prepare import Prepared
from elastic_moe.metrics.goodput import GoodputLog
from elastic_moe.metrics.jsonl import last_lines, read_jsonl
from elastic_moe.metrics.recorder import Listener, Recorder
from elastic_moe.run_dir import EVENTS, LOGS, METRICS, OPERATOR, checkpoint_root

RECENT_BYTES = 1 << 16  # of each file, some hundred lines, for `status` from another machine
DURABLE = ("checkpoint", "initialisation")  # sources of a view's state that may be older than the newest record


class RunCoordinator:
    """One run's coordinator.

    Args:
        config: the run's configuration; `run.dir` is absolute.
        token: shared secret of the run.
        target: number of workers to start with.
        host: address to listen on, reachable from every worker.
        restarted: another coordinator of this run was here before, and its workers may live.
        prepared: the corpus, served to workers that do not see it.
        listener: gets a copy of what is written to the run's files.
        began_s: wall clock of this node when the run was started last: generations are counted from there.

    Attributes:
        address: host and port where workers connect.
    """

    def __init__(
        self,
        config: TrainConfig,
        token: str,
        target: int,
        host: str = "127.0.0.1",
        restarted: bool = False,
        prepared: Prepared | None = None,
        listener: Listener | None = None,
        began_s: float = 0.0,
    ) -> None:
        self._run_dir = run_dir = Path(config.run.dir)
        set_timeout(config.checkpoint.timeout_s)
        self._goodput = GoodputLog(run_dir, config.cluster.price_per_hour)
        self._recorder = Recorder(run_dir, listeners=tuple(filter(None, (self._goodput, listener))))
        self._recorder.event({"event": "started", "restarted": restarted, "step": self._recorder.last_step})
        self._records = StepRecords(run_dir, self._recorder)
        root = checkpoint_root(config)
        self._identity = IdentityFiles.open(run_dir, root)
        if not restarted:
            self._identity.begin_start()
        before = _last(run_dir, began_s) if restarted else {}
        self._entered = before.get("entered", (0, 0))[0]  # generation of the last entry
        self._rolled_back = self._identity.identity.last_fork  # generation that did so last, and to which step
        self._checkpoints = CheckpointCommitter(
            root,
            config.checkpoint.keep,
            {"seed": config.seed, "steps": config.run.steps},
            self._recorder.event,
            self._identity,
            before.get("checkpoint", (0, 0)),
            SaveSteps(config).stays,
        )
        self._worker_logs = WorkerLogs(run_dir / LOGS)
        self._server = ControlServer(
            config,
            token,
            target,
            host=host,
            on_record=self._records.add,
            on_event=self._on_event,
            on_shard=self._checkpoints.add,
            restarted=restarted,
        )
        self._files = FileServer(host, token, served_places(config, prepared))
        self._server.welcome = WelcomeMessage(
            files=self._files.start(), witness=witness(root, token, write=not restarted)
        )
        self.address = self._server.start()
        self._closed = False
        self._wishing = threading.Lock()
        self._wishes = Wishes(run_dir / OPERATOR, self._recorder, config.sweep.workers)
        for wish in self._wishes.known(restarted):
            self._server.submit(wish)

    def submit(self, request: Mapping[str, Any]) -> None:
        """Take a request, see `control.codec.decode_request`; after `close` it has no effect.

        Raises:
            ValueError: there is no such request.
        """
        value = decode_request(request)
        if not self._closed:
            with self._wishing:  # of two operators, the one that counts now is also the one that is kept
                self._wishes.note(value)
                self._server.submit(value)

    def status(self) -> RunStatus:
        """The state of the run."""
        return self._server.status()

    def goodput(self) -> dict[str, Any]:
        """What the workers' time has gone into, as a line of goodput.jsonl."""
        return self._goodput.now()

    def records_since(self, step: int) -> list[dict[str, Any]]:
        """Records of steps after this one, in order."""
        return self._records.since(step)

    def recent(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The last records and the last events, for who does not see the run directory."""
        found = [last_lines(self._run_dir / name, RECENT_BYTES) for name in (METRICS, EVENTS)]
        return found[0], found[1]

    def close(self) -> None:
        """Cut the connections, complete the checkpoints reported so far, and close the run's files."""
        if self._closed:
            return
        self._closed = True
        self._server.close()
        self._files.close()
        self._checkpoints.close()
        self._recorder.close()
        self._goodput.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == WORKER_LOG:
            self._worker_logs.write(event)
            return
        if event.get("event") == "entered":
            generation, step = int(event["generation"]), max(0, int(event["step"]))
            if generation <= self._entered:
                return  # told again to a coordinator that was started again; steps were made since
            self._entered = generation
            behind = self._recorder.last_step - step
            lost = max(0, int(event.get("lost_steps", 0)), behind)
            # The dead may have been one step ahead, which is made again. Peers further behind had been cut off.
            if behind > 1 or event.get("source") in DURABLE:
                self._roll_back_to(generation, step)
            event = event | {"lost_steps": lost}
        self._recorder.event(event)

    def _roll_back_to(self, generation: int, step: int) -> None:
        """Set aside all records after this step, because the state of this generation came from storage."""
        if (generation, step) == self._rolled_back:
            return  # a second report of the same generation may come after its first new record
        self._rolled_back = generation, step
        dropped = self._records.roll_back_to(step, self._identity.identity.timeline)
        self._checkpoints.roll_back_to(step, generation, dropped)
        if dropped:
            event = {"event": "rolled_back", "generation": generation, "step": step, "lost_steps": dropped}
            self._recorder.event(event)


def _last(run_dir: Path, since_s: float) -> dict[str, tuple[int, int]]:
    """Generation and step of the newest entry and of the newest checkpoint since then that are recorded, by event."""
    events = (event for event in read_jsonl(run_dir / EVENTS) if event.get("time", 0.0) >= since_s)
    found = (event for event in events if event.get("event") in ("entered", "checkpoint"))
    return {event["event"]: (int(event.get("generation", 0)), int(event["step"])) for event in found}
