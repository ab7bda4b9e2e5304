"""Ranks as spawned processes for `gpu_nccl`: the driver plays the coordinator, tells ranks what to do, and ends them.

A rank is told to call a function of `gpu_ranks` and answers with its result; in between it may say a note. The order
"abort" sets the current abort signal from a thread, as the connection to the coordinator does. What a rank prints, and
what NCCL prints in it, goes to a file. Of a rank that is silent for too long, the stacks of all threads are shown.

Several ranks share one GPU: NCCL refuses that for ranks of one host, and tells hosts apart by NCCL_HOSTID. They then
talk over sockets. So these runs prove order, aborts and bytes, and nothing about speed between GPUs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing as mp
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo

from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import BACKENDS, Group
from elastic_moe.parallel.collectives.nccl import NCCL_BACKENDS
from elastic_moe.parallel.collectives.store import Rendezvous

FORM_TIMEOUT_S = 20.0
TAIL_BYTES = 3000  # of a rank's output that a failure shows
ENVIRONMENT = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MAX_CTAS": "2",
    "GLOO_SOCKET_IFNAME": "lo",
}


class RankFailed(RuntimeError):
    """A rank has failed or is silent; the message holds its traceback or its stacks, and the end of its output."""


@dataclass
class Seat:
    """What a rank's functions work with.

    Attributes:
        index: of the process among those of its world; its rank in a group is given with the group.
        abort: signal of the current generation.
        aborted_at_s: when it was set (monotonic clock); 0 before.
        kept: what a rank keeps between two calls.
    """

    index: int
    port: int
    device: torch.device
    line: Connection
    abort: AbortSignal = field(default_factory=AbortSignal)
    aborted_at_s: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)
    orders: queue.Queue[Any] = field(default_factory=queue.Queue)

    @property
    def rendezvous(self) -> Rendezvous:
        return Rendezvous("127.0.0.1", self.port, "secret", FORM_TIMEOUT_S)

    def form(self, generation: int, rank: int, world: int, on_host: bool = False) -> Group:
        """Begin a generation with an abort signal of its own; with the host's backend alone, or with that for the GPU
        too.
        """
        self.abort, self.aborted_at_s = AbortSignal(), 0.0
        member = GroupMember(generation, rank, world)
        if on_host or self.device.type != "cuda":
            return Group(member, self.rendezvous, self.abort, backends=BACKENDS)
        return Group(member, self.rendezvous, self.abort, device=self.device, backends=NCCL_BACKENDS)

    def note(self, value: Any) -> None:
        self.line.send(("note", value))

    def listen(self) -> None:
        """The control thread."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                order = self.line.recv()
                if order[0] == "abort":
                    self.aborted_at_s = time.monotonic()
                    self.abort.set(order[1])
                else:
                    self.orders.put(order)
        os._exit(0)  # the driver is gone


def _rank(index: int, port: int, device: str, line: Connection, output: str) -> None:
    """A rank's process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if device == "cuda":
        os.environ["NCCL_HOSTID"] = f"rank{index}"
    torch.set_num_threads(1)
    if not hasattr(ProcessGroupGloo, "set_timeout"):  # a torch older than the one that the package pins
        ProcessGroupGloo.set_timeout = ProcessGroupGloo._set_default_timeout
    seat = Seat(index, port, torch.device(device, 0) if device == "cuda" else torch.device(device), line)
    threading.Thread(target=seat.listen, daemon=True).start()
    functions = importlib.import_module("scripts.benchmarks.gpu_ranks")
    while True:
        name, *arguments = seat.orders.get()
        try:
            line.send(("result", getattr(functions, name)(seat, *arguments)))
        except BaseException:  # noqa: BLE001 the driver shows it
            line.send(("error", traceback.format_exc()))


class World:
    """Ranks that wait for orders, as a context manager that kills them at its end.

    Args:
        count: of processes.
        device: "cuda" or "cpu".
        deadline_s: on the monotonic clock; no wait lasts longer.
    """

    def __init__(self, count: int, device: str, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._folder = tempfile.TemporaryDirectory(prefix="gpu_nccl_")
        self._rendezvous = RendezvousServer("127.0.0.1", "secret")
        self._rendezvous.start()
        self._lines: list[Connection] = []
        self._processes: list[Any] = []
        context = mp.get_context("spawn")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("NCCL_DEBUG", "WARN")
        for index in range(count):
            here, there = context.Pipe()
            arguments = (index, self._rendezvous.port, device, there, str(self._output(index)))
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            self._lines.append(here)
            self._processes.append(process)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5.0)
        for line in self._lines:
            line.close()
        self._rendezvous.close()
        self._folder.cleanup()

    def tell(self, index: int, function: str, *arguments: Any) -> None:
        """Have a rank call a function of `gpu_ranks`, or set its abort signal ("abort", reason)."""
        with contextlib.suppress(OSError):  # it is dead; the wait for its answer says so
            self._lines[index].send((function, *arguments))

    def hear(self, index: int, timeout_s: float) -> Any:
        """A rank's next note or result.

        Raises:
            RankFailed: see there.
        """
        line = self._lines[index]
        timeout_s = max(0.0, min(timeout_s, self._deadline_s - time.monotonic()))
        try:
            if not line.poll(timeout_s):
                raise RankFailed(f"rank {index} is silent for {timeout_s:.1f} s\n{self.stacks()}")
            kind, value = line.recv()
        except (EOFError, OSError) as error:
            raise RankFailed(f"rank {index} has died: {error}\n{self._tail(index)}") from error
        if kind == "error":
            raise RankFailed(f"rank {index}:\n{value}\n{self._tail(index)}")
        return value

    def signal(self, index: int, number: int) -> None:
        """Send a signal to one rank's process."""
        os.kill(self._processes[index].pid, number)

    def kill(self, index: int) -> None:
        """End one rank that is not needed any more, stopped or not."""
        self._processes[index].kill()
        self._processes[index].join(5.0)

    def stacks(self) -> str:
        """The stacks and the last output of all ranks that live."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(self._tail(index) for index, process in enumerate(self._processes) if process.is_alive())

    def _output(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.log"

    def _tail(self, index: int) -> str:
        path = self._output(index)
        text = path.read_bytes()[-TAIL_BYTES:].decode(errors="replace") if path.exists() else ""
        return f"--- output of rank {index} ---\n{text}"
