"""NCCL or gloo: all ranks decide alike from what each has shown, and a sentence says why it is not NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from elastic_moe.environment import environment
from elastic_moe.errors import FormingFailed, UserError
from elastic_moe.parallel.collectives.backend import BackendError
from elastic_moe.parallel.collectives.choice import (
    FAILED,
    FAILURES,
    NO_LIBRARY,
    NOTHING,
    ON_CPU,
    GpuCollectives,
    why_not,
)

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
OVER_NCCL = "tensors on GPUs travel over NCCL"


@pytest.fixture(autouse=True)
def no_variables() -> Iterator[None]:
    with environment({"NCCL_NVLS_ENABLE": "0"}):
        yield


def _no_library() -> object:
    raise BackendError("there is no libnccl.so.2")


def _worker(wanted: str = "auto", device: torch.device = CUDA, gpu: str = "a", load: Any = object) -> GpuCollectives:
    return GpuCollectives(wanted, device, load, cast(Any, object), lambda _: gpu)


class FakeGroup:
    """Gathers what all workers show: first from each of them, then to each of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.shown, self.used = world_size, list[torch.Tensor](), list[str]()
        self.fails = False

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device.type == "cpu", "what is shown travels over the host's backend"
        self.shown.append(tensor)
        return torch.stack((self.shown + [tensor] * self.world_size)[: self.world_size])

    def use(self, kind: str, make: Callable[[], object]) -> None:
        self.used.append(kind)
        if self.fails:
            raise FormingFailed("NCCL error 2")


def _join(*workers: GpuCollectives, fails: bool = False) -> tuple[list[str], FakeGroup]:
    """What the last rank learns, after the others have shown theirs; then all of them, who know all."""
    group = FakeGroup(len(workers))
    group.fails = fails
    group.shown = [torch.tensor([worker._obstacle, worker._gpu], dtype=torch.int64) for worker in workers]
    return [worker.join(cast(Any, group)) for worker in workers], group


def test_workers_with_gpus_of_their_own_take_nccl() -> None:
    said, group = _join(_worker(gpu="a"), _worker(gpu="b"), _worker(gpu="c"))
    assert said == [OVER_NCCL] * 3
    assert group.used == ["cuda"] * 3


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: _worker(gpu="a"), "the workers of ranks 0 and 2 share a GPU"),
        (lambda: _worker(device=CPU), "the worker of rank 2 computes on a CPU"),
        (lambda: _worker(load=_no_library), "the worker of rank 2 has no NCCL of version 2.28.9 or newer"),
    ],
)
def test_one_that_cannot_brings_all_to_gloo(other: Callable[[], GpuCollectives], reason: str) -> None:
    said, group = _join(_worker(gpu="a"), _worker(gpu="b"), other())
    assert said == [f"tensors on GPUs travel over gloo, through host memory: {reason}"] * 3
    assert group.used == []
    if "CPU" not in reason and "NCCL of" not in reason:
        with pytest.raises(UserError, match=rf"^cluster.collectives is nccl, but {reason}: give every worker"):
            _join(_worker("nccl", gpu="a"), _worker("nccl", gpu="b"), _worker("nccl", gpu="a"))


def test_nothing_is_said_where_no_worker_has_a_gpu_or_gloo_was_asked_for() -> None:
    assert _join(_worker(device=CPU), _worker(device=CPU))[0] == ["", ""]
    said, group = _join(_worker("gloo", gpu="a"), _worker("gloo", gpu="b"))
    assert said == ["", ""]
    assert group.used == []
    assert _join(_worker())[0] == [""], "alone"


def test_nccl_that_was_asked_for_and_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"has no NCCL .* \(there is no libnccl.so.2\): give every worker a GPU"):
        _worker("nccl", load=_no_library)
    with pytest.raises(UserError, match="the worker of rank 0 computes on a CPU"):
        _join(_worker("nccl", device=CPU), _worker("nccl", device=CPU))


def test_a_worker_that_fails_again_and_again_asks_for_gloo() -> None:
    one, two = _worker(gpu="a"), _worker(gpu="b")
    for attempt in range(FAILURES):
        with pytest.raises(FormingFailed):
            _join(one, two, fails=True)
        if attempt == 0:
            assert _join(one, two)[0] == [OVER_NCCL] * 2, "a failure that does not last is forgotten"
    with pytest.raises(FormingFailed):
        _join(one, two, fails=True)
    said, group = _join(one, two)
    assert said[0] == said[1]
    assert said[0].endswith(f"rank 0 could not be connected over NCCL {FAILURES} times in a row")
    assert group.used == []


def test_the_reason_names_the_first_rank() -> None:
    assert why_not([NOTHING, NO_LIBRARY, ON_CPU], [1, 0, 0]).startswith("the worker of rank 1 has no NCCL")
    assert why_not([NOTHING, FAILED], [1, 2]).startswith("the worker of rank 1 could not be connected")
    assert why_not([NOTHING] * 4, [5, 6, 7, 6]) == "the workers of ranks 1 and 3 share a GPU"
    assert why_not([NOTHING, NOTHING], [5, 6]) == ""
