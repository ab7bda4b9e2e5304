"""What a rank of `gpu_nccl` does when it is told to. Every function takes the rank's seat, and returns plain values."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from typing import Any

import torch

from elastic_moe.errors import GroupAborted
from elastic_moe.parallel.collectives import nccl_library
from elastic_moe.parallel.collectives.backend import (
    AllGather,
    AllReduce,
    AllToAll,
    BackendError,
    Broadcast,
    GroupMember,
    Operation,
    Reduction,
)
from elastic_moe.parallel.collectives.group import HOST, Group
from elastic_moe.parallel.collectives.nccl import NcclBackend
from elastic_moe.parallel.collectives.store import Rendezvous
from scripts.benchmarks.gpu_world import Seat

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
FUNCTIONS = ("ncclCommRevoke", "ncclCommShrink", "ncclCommGrow", "ncclAlltoAll", "ncclCommSplit", "ncclCommFinalize")
SENTINEL = -1.0


def ready(seat: Seat) -> bool:
    """Make the context on the GPU, and the kernels that later functions use."""
    return healthy(seat)


def facts(seat: Seat) -> dict[str, Any]:
    """Versions, the GPU, the host."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "cpus": os.cpu_count()}
    with open("/proc/meminfo") as lines:
        found["host_gib"] = round(int(next(lines).split()[1]) / 2**20)
    found["mps"] = shutil.which("nvidia-cuda-mps-control")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = "--query-gpu=name,driver_version,memory.total,compute_mode"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    try:
        library = nccl_library.load()
    except BackendError as error:
        return {**found, "nccl": None, "error": str(error)}
    found["nccl"] = library.version
    found["functions"] = {name: hasattr(library._native, name) for name in FUNCTIONS}
    return found


def alone(seat: Seat, generations: int) -> dict[str, Any]:
    """World 1: form, each operation, end; every second generation is aborted. Counts what stays behind."""
    form_s: list[float] = []
    release_s: list[float] = []
    levels: dict[int, dict[str, int]] = {}
    wrong: list[str] = []
    for generation in range(generations):
        backend, began_s = NcclBackend(), time.monotonic()
        backend.form(GroupMember(generation, 0, 1), Rendezvous("nowhere", 0, "", 20.0))
        form_s.append(time.monotonic() - began_s)
        x = torch.randn(1000, 3, device=seat.device)
        moved, gathered, kept = torch.zeros_like(x), torch.zeros(1, *x.shape, device=seat.device), x.clone()
        for operation in (
            AllToAll(moved, x, [1000], [1000]),
            AllGather(gathered, x),
            AllReduce(x, Reduction.SUM),
            AllReduce(x, Reduction.MAX),
            Broadcast(x, 0),
        ):
            _complete(backend, operation)
        if not (torch.equal(moved, kept) and torch.equal(gathered[0], kept) and torch.equal(x, kept)):
            wrong.append(f"generation {generation}")
        if generation % 2:
            backend.abort()
        began_s = time.monotonic()
        backend.release()
        release_s.append(time.monotonic() - began_s)
        if generation in (generations // 5, generations - 1):
            torch.cuda.synchronize()
            levels[generation] = {
                "free_mib": torch.cuda.mem_get_info()[0] >> 20,
                "threads": len(os.listdir("/proc/self/task")),
                "descriptors": len(os.listdir("/proc/self/fd")),
            }
    return {
        "first_form_s": form_s[0],
        "form_s": statistics.median(form_s[1:]),
        "longest_form_s": max(form_s[1:]),
        "release_s": statistics.median(release_s),
        "longest_release_s": max(release_s),
        "levels": levels,
        "ends_left": _ends_left(),
        "wrong": wrong,
    }


def _complete(backend: NcclBackend, operation: Operation) -> None:
    work = backend.begin(operation)
    while not backend.poll(work, 0.02):
        pass


def compare(seat: Seat, generation: int, rank: int, world: int, numel: int) -> dict[str, Any]:
    """Every operation of `Group` on the device, against the host's backend on the same inputs; then speed.

    At the end, rank 0 closes its group as soon as its own part is done; the others' bytes must be right all the same.
    """
    began_s = time.monotonic()
    group = seat.form(generation, rank, world)
    formed_s = time.monotonic() - began_s
    wrong: list[str] = []
    checked = 0
    for dtype in DTYPES:
        for name, device_result, host_result in _pairs(seat, group, dtype):
            checked += 1
            if not torch.equal(device_result.cpu(), host_result.to(dtype)):
                wrong.append(f"{name} {dtype}")
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(rank))
    on_device, on_host = x.to(seat.device), x.double()
    group.all_reduce(on_device)
    group.all_reduce(on_host)
    error = float(((on_device.cpu() - on_host).abs().max() / on_host.abs().max()).item())
    speed = _speed(seat, group, numel)
    splits = [numel // world] * world
    sent = torch.full((sum(splits),), float(rank), device=seat.device)
    out = torch.full_like(sent, SENTINEL)
    group.all_to_all(out, sent, splits, splits)
    if rank == 0:
        group.close()
    expected = torch.arange(world, dtype=out.dtype, device=seat.device).repeat_interleave(splits[0])
    if not torch.equal(out, expected):
        wrong.append("the last operation before the end of rank 0")
    began_s = time.monotonic()
    group.close()
    closed_s = time.monotonic() - began_s
    return {"formed_s": formed_s, "closed_s": closed_s, "checked": checked, "wrong": wrong, "error": error, **speed}


def _pairs(seat: Seat, group: Group, dtype: torch.dtype) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(operation, result on the device, the host's result as float64) of all operations with small whole numbers."""
    rank, world = group.rank, group.world_size
    random = torch.Generator().manual_seed(100 * rank + 1)
    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def values(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.randint(0, 2 if dtype == torch.bool else 9, shape, generator=random).to(dtype)
        return drawn.to(seat.device), drawn.to(torch.float64, copy=True)

    if dtype != torch.bool:
        for reduction in Reduction:
            device, host = values(257, 3)
            group.all_reduce(device, reduction)
            group.all_reduce(host, reduction)
            found.append((f"all_reduce {reduction.value}", device, host))
        device, host = values(64, 2)
        group.all_reduce(device[:, 0])
        column = host[:, 0].contiguous()
        group.all_reduce(column)
        found.append(("all_reduce of a column", device[:, 0], column))
    device, host = values(5, 7)
    gathered = group.all_gather(host)
    found.append(("all_gather", group.all_gather(device), gathered))
    found.append(("all_gather to the host", group.all_gather(device, device=HOST), gathered))
    found.append(("all_gather from the host", group.all_gather(device.cpu(), device=seat.device), gathered))
    in_splits = [(2 * rank + 3 * d) % 5 * 100 for d in range(world)]  # some are zero
    out_splits = [(2 * s + 3 * rank) % 5 * 100 for s in range(world)]
    device, host = values(sum(in_splits), 2)
    out, host_out = device.new_zeros(sum(out_splits), 2), host.new_zeros(sum(out_splits), 2)
    group.all_to_all(out, device, out_splits, in_splits)
    group.all_to_all(host_out, host, out_splits, in_splits)
    found.append(("all_to_all", out, host_out))
    for src in range(world):
        device, host = values(33)
        group.broadcast(device, src)
        group.broadcast(host, src)
        found.append((f"broadcast from {src}", device, host))
    return found


def _speed(seat: Seat, group: Group, numel: int) -> dict[str, float]:
    """Seconds of a small all-reduce, and bytes that leave a rank per second in an all-to-all of `numel` floats."""
    small_s: list[float] = []
    one = torch.ones(1, device=seat.device)
    for _ in range(20):
        began_s = time.monotonic()
        group.all_reduce(one)
        small_s.append(time.monotonic() - began_s)
    splits = [numel // group.world_size] * group.world_size
    sent = torch.ones(sum(splits), device=seat.device)
    out = torch.empty_like(sent)
    large_s: list[float] = []
    for _ in range(4):
        group.barrier()
        began_s = time.monotonic()
        group.all_to_all(out, sent, splits, splits)
        large_s.append(time.monotonic() - began_s)
    moved_bytes = 4 * splits[0] * (group.world_size - 1)
    return {"small_ms": 1e3 * statistics.median(small_s), "gb_per_s": moved_bytes / 1e9 / statistics.median(large_s)}


def loop(seat: Seat, generation: int, rank: int, world: int, operation: str, numel: int) -> dict[str, Any]:
    """Operations one after the other until the group ends; says "looping" once three have completed.

    Returns what ended it and how long after the signal (None: before it), how many operations completed, how many of
    these with wrong bytes, how many of those all ranks attested, and whether the GPU and the state on it are as before.
    """
    state = seat.kept.setdefault("state", torch.randn(1_000_000, device=seat.device))
    kept = state.cpu()
    splits = [numel // world] * world
    sent = torch.empty(sum(splits), device=seat.device)
    base = 1000.0 * torch.arange(world, dtype=sent.dtype, device=seat.device).repeat_interleave(splits[0])
    out = torch.empty_like(sent)
    completed, wrong, attested, samples = 0, 0, 0, list[float]()
    reason, raised_s = "", 0.0
    group = seat.form(generation, rank, world)
    try:
        while True:
            sent.fill_(1000.0 * rank + completed % 100)
            if operation == "all_to_all":
                out.fill_(SENTINEL)
                group.all_to_all(out, sent, splits, splits)
                expected = base + completed % 100
            else:
                out.copy_(sent)
                group.all_reduce(out)
                expected = torch.full_like(out, 500.0 * world * (world - 1) + world * (completed % 100))
            different = out[out != expected]
            completed += 1
            if different.numel():
                wrong, samples = wrong + 1, [float(different.numel()), *different.unique()[:5].tolist()]
                group.attest()
                attested += 1
            if completed == 3:
                seat.note("looping")
    except GroupAborted as error:
        reason, raised_s = str(error), time.monotonic()
    group.close()
    late_s = raised_s - seat.aborted_at_s if seat.aborted_at_s else None
    return {
        "late_s": late_s,
        "reason": reason[:300],
        "completed": completed,
        "wrong": wrong,
        "wrong_attested": attested,
        "wrong_values": samples,  # their number, and some of them
        "ends_left": _ends_left(),
        "gpu_ok": healthy(seat),
        "state_ok": torch.equal(state.cpu(), kept),
    }


def regroup(seat: Seat, generation: int, rank: int, world: int) -> dict[str, Any]:
    """Form the survivors' group, and complete an operation of each kind."""
    began_s = time.monotonic()
    group = seat.form(generation, rank, world)
    formed_s = time.monotonic() - began_s
    total = torch.ones(1000, device=seat.device)
    group.all_reduce(total)
    sent, out = torch.full((world,), float(rank), device=seat.device), torch.empty(world, device=seat.device)
    group.all_to_all(out, sent, [1] * world, [1] * world)
    right = bool((total == world).all()) and out.tolist() == list(range(world))
    group.close()
    return {"formed_s": formed_s, "right": right, "ends_left": _ends_left()}


def absent(seat: Seat, generation: int, rank: int, world: int) -> bool:
    """Arrive at the host's backend, learn or make the communicator's id, and go no further until the signal."""
    group = seat.form(generation, rank, world, on_host=True)
    NcclBackend()._spread(nccl_library.load(), GroupMember(generation, rank, world), seat.rendezvous)
    seat.note("absent")
    ended = seat.abort.wait(30.0)
    group.close()
    return ended


def form_without_one(seat: Seat, generation: int, rank: int, world: int) -> dict[str, Any]:
    """Form a group of which one member does not come; the signal has to end that."""
    try:
        seat.form(generation, rank, world).close()
        reason, raised_s = "", 0.0
    except GroupAborted as error:
        reason, raised_s = str(error), time.monotonic()
    late_s = raised_s - seat.aborted_at_s if seat.aborted_at_s and reason else None
    return {"late_s": late_s, "reason": reason[:300], "ends_left": _ends_left(), "gpu_ok": healthy(seat)}


def stand(seat: Seat, generation: int, rank: int, how: str) -> dict[str, Any]:
    """Rank 0 waits for the device, behind an operation that rank 1 never joins, in the way that `how` says."""
    group = seat.form(generation, rank, 2)
    group.barrier()
    if rank == 1:
        seat.note("standing")
        seat.abort.wait(30.0)
        group.close()
        return {}
    sent, out = torch.ones(1_000_000, device=seat.device), torch.zeros(1_000_000, device=seat.device)
    pending = group.begin_all_to_all(out, sent, [500_000] * 2, [500_000] * 2)
    work: Any = pending.work
    torch.cuda.current_stream().wait_event(work.end)
    seat.note("standing")
    if how == "cpu":
        out.cpu()
    else:
        torch.cuda.synchronize()
    returned_s = time.monotonic()
    late_s = returned_s - seat.aborted_at_s if seat.aborted_at_s else None
    raised = False
    try:
        pending.wait()
    except GroupAborted:
        raised = True
    raised_s = time.monotonic() - returned_s
    group.close()
    found = {"late_s": late_s, "raised": raised, "raised_s": raised_s}
    return {**found, "ends_left": _ends_left(), "gpu_ok": healthy(seat)}


def _ends_left() -> int:
    """Communicators whose end still blocks a thread."""
    return sum(thread.name == "nccl-end" for thread in threading.enumerate())


def healthy(seat: Seat) -> bool:
    """Whether a product of matrices is right on the device."""
    ones = torch.ones(512, 512, device=seat.device)
    return bool(((ones @ ones) == 512).all())
