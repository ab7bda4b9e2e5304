"""State of a GPU's worker: the update, the checksums and the host copies are those of a worker without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.optim import adamw
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.runtime.checkpoints import _host_copies
from elastic_moe.runtime.checksums import PERIOD, checksums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def _state(numel: int) -> UnitState:
    made = torch.Generator().manual_seed(numel)
    state = UnitState({name: torch.randn(numel, generator=made) for name in ("weight", "m", "v")})
    state["v"].abs_()
    return state


def _on_gpu(state: UnitState) -> UnitState:
    return UnitState({name: tensor.to(CUDA) for name, tensor in state.fields.items()})


def test_checksums() -> None:
    states = [_state(numel) for numel in (1, 2, 31, 2 * PERIOD, 2 * PERIOD + 5, 70_001)]
    assert np.array_equal(checksums([_on_gpu(state) for state in states]), checksums(states))


def test_host_copies() -> None:
    state = _state(100_000)
    copies = _host_copies(_on_gpu(state).fields)
    for name, tensor in state.fields.items():
        assert copies[name].device.type == "cpu"
        assert torch.equal(copies[name], tensor)


@pytest.mark.parametrize("fused", [True, False])
def test_twins_on_gpus_and_cpus_are_equal_bit_for_bit(fused: bool) -> None:
    """However the units lie in memory, with gradients of very different sizes, and with and without Triton."""
    numel, cfg = 1_000_003, OptimConfig()
    host = _state(numel)
    room = UnitState({k: torch.empty(numel + 7, device=CUDA)[7:] for k in host.fields})
    twins = [_on_gpu(host), room]
    room.copy_(host)
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(adamw, "has_triton", lambda _: False)
        else:
            assert adamw.has_triton(CUDA)
        for step in range(1, 21):
            made = torch.Generator().manual_seed(step)
            grad = torch.randn(numel, generator=made) * 10.0 ** torch.empty(numel).uniform_(-24, 4, generator=made)
            adamw.apply_adamw(host, grad, step, 1e-3, cfg, True)
            for twin in twins:
                adamw.apply_adamw(twin, grad.to(CUDA), step, 1e-3, cfg, True)
    for name, tensor in host.fields.items():
        assert torch.equal(twins[0][name], twins[1][name]), name
        assert torch.equal(twins[0][name].cpu(), tensor), name
