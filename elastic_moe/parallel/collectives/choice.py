"""The library that carries tensors on GPUs in a generation: NCCL where every member can use it, else gloo.

All members must decide alike: an operation that one begins over NCCL and another one over gloo never ends. So each of
them shows over the host's backend, which is formed first, what keeps it from using NCCL and which GPU it computes on.
What they have shown decides.

gloo takes tensors on GPUs through host memory. It stays the control plane beside NCCL: forming, votes, attestations,
and all tensors on the host.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from elastic_moe.errors import FormingFailed, UserError
from elastic_moe.parallel.collectives import nccl_library
from elastic_moe.parallel.collectives.backend import BackendError, CollectiveBackend
from elastic_moe.parallel.collectives.group import HOST, Group
from elastic_moe.parallel.collectives.nccl import NcclBackend

FAILURES = 3  # to form NCCL's communicator, one after the other, before a worker asks for gloo
NOTHING, ON_CPU, NO_LIBRARY, FAILED = range(4)  # what keeps a worker from using NCCL
OBSTACLES = {
    ON_CPU: "computes on a CPU",
    NO_LIBRARY: "has no NCCL of version 2.28.9 or newer",
    FAILED: f"could not be connected over NCCL {FAILURES} times in a row",
}
ADVICE = "give every worker a GPU of its own (cluster.gpus_per_worker=1), or set cluster.collectives=auto"


class GpuCollectives:
    """One worker's part in the choice, from generation to generation.

    Args:
        wanted: `cluster.collectives`.
        device: that computes.
        load: gives NCCL's functions.
        make: makes a backend over NCCL.
        gpu: names a GPU; no two GPUs have the same name.

    Raises:
        UserError: `wanted` is nccl, and this worker has no NCCL.
    """

    def __init__(
        self,
        wanted: str,
        device: torch.device,
        load: Callable[[], object] = nccl_library.load,
        make: Callable[[], CollectiveBackend[Any]] = NcclBackend,
        gpu: Callable[[torch.device], str] | None = None,
    ) -> None:
        self._wanted, self._device, self._make = wanted, device, make
        self._failures = self._gpu = 0
        self._obstacle, error = NOTHING if device.type == "cuda" else ON_CPU, ""
        if wanted == "gloo" or self._obstacle:
            return
        try:
            load()
        except BackendError as missing:
            self._obstacle, error = NO_LIBRARY, str(missing)
        if wanted == "nccl" and self._obstacle:
            raise UserError(
                f"cluster.collectives is nccl, but a worker {OBSTACLES[self._obstacle]} ({error}): {ADVICE}."
            )
        name = (gpu or _gpu_name)(device)
        self._gpu = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # its multicast objects outlive no member of a node

    def join(self, group: Group) -> str:
        """Decide with the other members, and form NCCL's communicator where all can use it; collective.

        Args:
            group: of the new generation, with the host's backend only.

        Returns:
            One sentence about the library that carries tensors on GPUs; "" where there is no choice.

        Raises:
            UserError: `cluster.collectives` is nccl, and the members cannot use NCCL.
            FormingFailed: NCCL's communicator could not be formed.
            GroupAborted: the generation is over.
        """
        if group.world_size == 1 or self._wanted == "gloo":
            return ""
        shown_R2 = group.all_gather(torch.tensor([self._obstacle, self._gpu], dtype=torch.int64, device=HOST)).tolist()
        obstacles_R = [obstacle for obstacle, _ in shown_R2]
        reason = why_not(obstacles_R, [gpu for _, gpu in shown_R2])
        if reason and self._wanted == "nccl":
            raise UserError(f"cluster.collectives is nccl, but {reason}: {ADVICE}.")
        if set(obstacles_R) == {ON_CPU}:
            return ""
        if reason:
            return f"tensors on GPUs travel over gloo, through host memory: {reason}"
        try:
            group.use(self._device.type, self._make)
        except FormingFailed:
            self._failures += 1
            if self._failures >= FAILURES:
                self._obstacle = FAILED
            raise
        self._failures = 0
        return "tensors on GPUs travel over NCCL"


def why_not(obstacles_R: Sequence[int], gpus_R: Sequence[int]) -> str:
    """Why a group cannot use NCCL, as a part of a sentence; "" if it can. The same on every rank.

    Args:
        obstacles_R: what keeps each rank from it.
        gpus_R: the GPU of each rank.
    """
    for rank, obstacle in enumerate(obstacles_R):
        if obstacle != NOTHING:
            return f"the worker of rank {rank} {OBSTACLES[obstacle]}"
    for rank, gpu in enumerate(gpus_R):
        if (first := gpus_R.index(gpu)) != rank:
            return f"the workers of ranks {first} and {rank} share a GPU"
    return ""


def _gpu_name(device: torch.device) -> str:
    """The host and the GPU, as NCCL tells GPUs apart: NCCL_HOSTID lets processes that share one pass for several."""
    host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
    return f"{host}/{torch.cuda.get_device_properties(device).uuid}"
