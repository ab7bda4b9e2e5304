"""Simulated workers: one process with a connection each to a coordinator.

They send heartbeats and enter every view. When one of them dies, the collectives of all others fail, as in a run.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from typing import Any

from elastic_moe.config.pace import pace
from elastic_moe.control.codec import encode
from elastic_moe.control.messages import EnteredMessage, HeartbeatMessage, HelloMessage, SuspectMessage

TOKEN = "benchmark"
LINE_LIMIT = 1 << 24  # bytes of a message
CONNECT_AT_ONCE = 64


class SimulatedWorkers:
    """The process of the simulated workers; a context manager that ends it.

    Args:
        address: of the coordinator.
        num_workers: connections.
        per_node: workers of one node.
        heartbeat_s: seconds between two heartbeats of a worker.
    """

    def __init__(self, address: tuple[str, int], num_workers: int, per_node: int, heartbeat_s: float) -> None:
        self._pipe, theirs = mp.get_context("spawn").Pipe()
        arguments = (theirs, address, num_workers, per_node, heartbeat_s)
        self._process = mp.get_context("spawn").Process(target=_work, args=arguments, daemon=True)

    def __enter__(self) -> SimulatedWorkers:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def kill(self, worker: int, timeout_s: float) -> float | None:
        """Close a worker's connection. Returns the seconds until all others have the next view; None: too many."""
        self._pipe.send((worker, timeout_s))
        return self._pipe.recv()


class _Workers:
    """All simulated workers, in the event loop of their process."""

    def __init__(self, address: tuple[str, int], num_workers: int, per_node: int, heartbeat_s: float) -> None:
        self._address, self._per_node, self._heartbeat_s = address, per_node, heartbeat_s
        self._num_workers = num_workers
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._view_at_s: dict[int, float] = {}  # arrival of each worker's newest view
        self._generation = [0] * num_workers

    async def run(self, pipe: Connection) -> None:
        connecting = asyncio.Semaphore(CONNECT_AT_ONCE)
        tasks = [asyncio.create_task(self._worker(number, connecting)) for number in range(self._num_workers)]
        while True:
            worker, timeout_s = await asyncio.to_thread(pipe.recv)
            pipe.send(await self._kill(worker, timeout_s))
            tasks = [task for task in tasks if not task.done()]

    async def _kill(self, worker: int, timeout_s: float) -> float | None:
        closed_s = time.monotonic()
        self._writers.pop(worker).transport.abort()
        await asyncio.sleep(0)  # in which the loop closes the connection, as a kernel does at once
        for other, writer in self._writers.items():
            writer.write(encode(SuspectMessage(self._generation[other], "Connection closed by peer")))
        while time.monotonic() < closed_s + timeout_s:
            if all(self._view_at_s.get(other, 0.0) > closed_s for other in self._writers):
                return max(self._view_at_s[other] for other in self._writers) - closed_s
            await asyncio.sleep(0.01)
        return None

    async def _worker(self, number: int, connecting: asyncio.Semaphore) -> None:
        async with connecting:
            reader, writer = await asyncio.open_connection(*self._address, limit=LINE_LIMIT)
        self._writers[number] = writer
        hello = HelloMessage(TOKEN, f"w{number:05d}", f"n{number // self._per_node:05d}", number, ready=True)
        writer.write(encode(hello))
        beats = asyncio.create_task(self._beat(number, writer))
        try:
            while line := await reader.readline():
                if b'"type":"view' in line[:40]:
                    self._view_at_s[number] = time.monotonic()
                    self._generation[number] = _generation_of(line)
                    writer.write(encode(EnteredMessage(self._generation[number])))
        except OSError:
            pass
        finally:
            beats.cancel()
            self._writers.pop(number, None)

    async def _beat(self, number: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._heartbeat_s * number / self._num_workers)
        progress = 0
        while not writer.is_closing():
            progress += 1
            writer.write(encode(HeartbeatMessage(self._generation[number], 1, progress)))
            await asyncio.sleep(pace(self._heartbeat_s, self._num_workers))


def _generation_of(line: bytes) -> int:
    """Generation of a view's message, without the cost of reading its members."""
    if b'"view_change"' in line[:40]:
        return int(json.loads(line)["generation"])
    head = line[: line.index(b'"members"')]
    return int(json.loads(head.rstrip(b",") + b"}}")["view"]["generation"])


def _work(pipe: Connection, *arguments: Any) -> None:
    asyncio.run(_Workers(*arguments).run(pipe))
