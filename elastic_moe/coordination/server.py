"""The coordinator's server: a thin shell around `control.machine` that holds one TCP connection per worker. No Ray, so tests run it alone.

It runs in a thread of its own. A connection that closes becomes an event in the same loop turn, so a death is answered within milliseconds;
the tick is only for what shows by silence. It also hosts the store through which groups form: rank 0's death must not take the store along.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control import events as ev
from elastic_moe.control.machine import initial_state, transition
from elastic_moe.control.state import FINISHING

TICK_S = 0.1
LINE_LIMIT = 1 << 24
HELLO_TIMEOUT_S = 10.0

Json = dict[str, Any]
logger = logging.getLogger(__name__)


class ControlServer:
    """Serves one run.

    Args:
        config: the run's configuration.
        token: shared secret of the run; who does not know it is turned away.
        target: workers the run starts with.
        host: address to listen on, and under which workers reach this process.
        on_record, on_event, on_shard: called in the server's thread with a committed step's record, a line for the event log, and the report
            of a written checkpoint shard.
    """

    def __init__(
        self,
        config: TrainConfig,
        token: str,
        target: int,
        host: str = "127.0.0.1",
        on_record: Callable[[Json], object] = lambda _: None,
        on_event: Callable[[Json], object] = lambda _: None,
        on_shard: Callable[[Json], object] = lambda _: None,
    ) -> None:
        self._config, self._steps, self._token, self._host = config.elastic, config.run.steps, token, host
        self._on_record, self._on_event, self._on_shard = on_record, on_event, on_shard
        self._state = initial_state(target)
        self._connections: dict[str, asyncio.StreamWriter] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._last: Json = {}
        self._evicted: dict[str, None] = {}
        self._published_s = 0.0
        self._store: dist.TCPStore | None = None  # pyright: ignore[reportPrivateImportUsage]
        self._address: tuple[str, int] = (host, 0)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="control-server", daemon=True)

    # --- called from any thread ---

    def start(self) -> tuple[str, int]:
        """Start serving. Returns the address that workers connect to."""
        self._store = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise RuntimeError(f"the control server cannot listen on {self._host}") from self._error
        return self._address

    def submit(self, event: Json) -> None:
        """Hand over an event: {"event": "drain" | "worker_lost" | "node_lost" | "stop", "worker"?, "node"?, "deadline_s"?, "reason"?}."""
        value = _submitted(event)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on, value)

    def status(self) -> Json:
        """Where the run stands, as plain values."""
        state, last = self._state, self._last
        view = state.view
        return {
            "step": max(int(last.get("step", 0)), 0),
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
            "evicted": list(self._evicted),
        }

    def close(self) -> None:
        """Stop serving and cut all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(5.0)
        self._store = None

    # --- the server's thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        try:
            server = await asyncio.start_server(self._serve, self._host, 0, limit=LINE_LIMIT)
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self._address = (self._host, server.sockets[0].getsockname()[1])
        self._started.set()
        while not self._stopping.is_set():
            self._on(ev.Tick())
            try:
                await asyncio.wait_for(self._stopping.wait(), TICK_S)
            except TimeoutError:
                continue
        server.close()
        for writer in list(self._connections.values()):
            writer.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        worker = ""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), HELLO_TIMEOUT_S))
            if not hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode()):
                _write(writer, {"type": "evicted", "reason": "wrong token"})
                return
            worker = str(hello["worker"])
            self._connections[worker] = writer
            self._on(_from_worker(worker, hello))
            while line := await reader.readline():
                self._message(worker, json.loads(line))
        except (
            OSError,
            TimeoutError,
            ValueError,
            KeyError,
        ) as error:  # broken, silent or talking nonsense: the same as closed
            logger.info("connection of %s: %r", worker or "an unknown peer", error)
        finally:
            self._handlers.discard(task)
            writer.close()
            if worker and self._connections.get(worker) is writer:
                del self._connections[worker]
                if not self._stopping.is_set():
                    self._on(ev.Lost(worker))

    def _message(self, worker: str, message: Json) -> None:
        match message["type"]:
            case "record":
                record = message["record"]
                if record["step"] >= self._last.get("step", -1):
                    self._last = record
                self._call(self._on_record, record)
            case "event":
                self._log(message["event"] | self._identity(worker))
            case "shard":
                self._call(self._on_shard, message["shard"] | {"worker": worker})
            case _:
                self._on(_from_worker(worker, message))
                if message["type"] == "entered":
                    self._log_entered(worker, message)

    def _on(self, event: ev.Event) -> None:
        """Let the machine decide, and carry out what it says."""
        self._state, commands, _ = transition(self._state, event, time.monotonic(), self._config)
        if isinstance(event, ev.Lost):
            self._evicted.pop(event.worker, None)
        for command in commands:
            self._do(command)

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Publish(view, planned, reason, workers):
                assert self._store is not None
                message = ev.view_to_wire(view) | {
                    "type": "view",
                    "planned": planned,
                    "reason": reason,
                    "store": [self._host, self._store.port],
                }
                self._send(workers, message)
                if reason != "re-registered":
                    self._published_s = time.monotonic()
                    kind = {"event": "view", "planned": planned, "reason": reason}
                    self._log(
                        kind | {"world_size": len(view.active_ranks), "members": [m.worker for m in view.members]}
                    )
            case ev.Pause(generation, workers, reason):
                self._send(workers, {"type": "hold", "generation": generation, "reason": reason})
            case ev.Welcome(worker):
                self._send((worker,), {"type": "welcome"})
            case ev.Probe(workers):
                self._send(workers, {"type": "probe"})
            case ev.Release(worker):
                self._send((worker,), {"type": "release"})
            case ev.StopAll(workers):
                self._send(workers, {"type": "stop"})
            case ev.Evict(worker, reason):
                self._send((worker,), {"type": "evicted", "reason": reason})
                if (writer := self._connections.pop(worker, None)) is not None:
                    writer.close()
            case ev.LogEvent(name, worker, node, pid, reason):
                if name == "worker_evicted":
                    self._evicted[worker] = None
                who = {"worker": worker, "node": node, "pid": pid} if worker else {}
                self._log({"event": name, "reason": reason} | who)
            case ev.End():
                pass

    def _send(self, workers: tuple[str, ...], message: Json) -> None:
        for worker in workers:
            writer = self._connections.get(worker)
            if writer is not None and not writer.is_closing():
                _write(writer, message)

    def _log_entered(self, worker: str, message: Json) -> None:
        """One line per view, from the rank that also sends its records: so it comes before them."""
        view = self._state.view
        if view is None or view.generation != message["generation"] or not view.active_ranks:
            return
        if view.members[view.active_ranks[0]].worker == worker:
            took = {
                "event": "entered",
                "world_size": len(view.active_ranks),
                "total_s": time.monotonic() - self._published_s,
            }
            self._log(took | self._identity(worker) | (message.get("info") or {}))

    def _identity(self, worker: str) -> Json:
        record = self._state.records.get(worker)
        return {"worker": worker} | ({"node": record.member.node, "pid": record.member.pid} if record else {})

    def _log(self, event: Json) -> None:
        view = self._state.view
        common = {"time": time.time(), "generation": view.generation if view else 0, "step": self.status()["step"]}
        self._call(self._on_event, common | event)

    def _call(self, callback: Callable[[Json], object], value: Json) -> None:
        try:
            callback(value)
        except OSError as error:  # a full disk stops the log, not the run
            logger.warning("cannot write %s: %s", value.get("event", "record"), error)


def _write(writer: asyncio.StreamWriter, message: Json) -> None:
    writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def _from_worker(worker: str, message: Json) -> ev.Event:
    """A worker's message as an event.

    Raises:
        ValueError: there is no such message.
    """
    generation = int(message.get("generation", 0))
    match message["type"]:
        case "hello":
            return ev.Hello(
                worker,
                str(message["node"]),
                int(message["pid"]),
                int(message.get("slots", 0)),
                bool(message.get("ready")),
                ev.view_from_wire(message),
                int(message.get("entered", 0)),
                int(message.get("step", 0)),
            )
        case "ready":
            return ev.Ready(worker)
        case "heartbeat":
            return ev.Heartbeat(worker, generation, int(message.get("step", 0)), int(message.get("progress", 0)))
        case "suspect":
            return ev.Suspect(worker, generation, str(message.get("error", "")))
        case "entered":
            return ev.Entered(worker, generation)
        case "finished":
            return ev.Finished(worker)
        case "left":
            return ev.Left(worker)
        case other:
            raise ValueError(f"unknown message {other!r}")


def _submitted(event: Json) -> ev.Event:
    """A submitted event as a value.

    Raises:
        ValueError: there is no such event.
    """
    reason = str(event.get("reason") or event["event"])
    match event["event"]:
        case "drain":
            return ev.Drain(
                str(event.get("worker") or ""),
                str(event.get("node") or ""),
                float(event.get("deadline_s") or 0),
                reason,
            )
        case "worker_lost":
            return ev.Lost(str(event["worker"]), reason)
        case "node_lost":
            return ev.NodeLost(str(event["node"]), reason)
        case "stop":
            return ev.Stop(reason)
        case other:
            raise ValueError(f"unknown event {other!r}")
