"""The kernel of AdamW for GPUs has the bits of the loop on a CPU.

Triton's interpreter runs it on CPU tensors, which shows its arithmetic, and not what it is compiled to: `tests/gpu` has
that.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.optim import adamw
from tests.triton_kernels import INTERPRETED, assert_compiles, run_interpreted
from tests.unit.optim.test_adamw import fresh, gradient

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_compiles_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_moe.optim.adamw_triton import _update

    factors = ("keep", "beta1", "rest1", "beta2", "rest2", "step_size", "root_scale", "eps")
    assert_compiles(_update, {"BLOCK": 1024}, dict.fromkeys(factors, "fp32"), tmp_path, monkeypatch)


@pytest.mark.parametrize("numel", [1, 1024, 3001])
def test_has_the_bits_of_the_loop(numel: int) -> None:
    if not INTERPRETED:
        pytest.skip("runs in a process with the interpreter")
    from elastic_moe.optim.adamw_triton import update

    cfg, generator = OptimConfig(weight_decay=0.1), torch.Generator().manual_seed(4)
    state, twin = fresh(numel), fresh(numel)

    def in_triton(tensors, factors) -> None:
        update(tensors, [float(factor) for factor in factors])

    for step in range(1, 6):
        grad = gradient(numel, generator)
        adamw.apply_adamw(twin, grad, step, 1e-3, cfg, True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adamw, "_on_cpu", in_triton)
            adamw.apply_adamw(state, grad, step, 1e-3, cfg, True)
        for name in ("weight", "m", "v"):
            assert torch.equal(state[name], twin[name]), (name, step)
