"""The Triton kernels of latent attention against plain torch: by Triton's interpreter, and compiled on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.model.attention.rope import rotate
from tests.triton_kernels import INTERPRETED, assert_compiles, run_interpreted

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in a process with the interpreter")
STRIDES = {f"{name}_{axis}": "i64" for name in ("plain", "turned", "grad") for axis in "bsh"}


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("heads", "plain", "rope", "value"), [(3, 16, 8, 16), (2, 12, 4, 16), (1, 32, 16, 10)])
def test_equals_plain_torch(
    heads: int, plain: int, rope: int, value: int, interleave: bool, dtype: torch.dtype
) -> None:
    """Values and gradients of queries, keys and values, whose gradients come transposed as attention gives them."""
    from elastic_moe.model.attention.triton import ExpandKeys, TurnTail

    angles = randn(5, rope // 2, seed=0)
    tables = angles.cos() * 1.1, angles.sin() * 1.1
    weights = [randn(2, heads, 5, plain + rope, seed=s) for s in (1, 2, 3)]
    found = []
    for fast in (True, False):
        q = randn(2, 5, heads, plain + rope, seed=4).to(dtype).requires_grad_()
        kv = randn(2, 5, heads, plain + value, seed=5).to(dtype).requires_grad_()
        latent = randn(2, 5, 7 + rope, seed=6).to(dtype).requires_grad_()
        shared = latent[..., 7:]
        if fast:
            queries = TurnTail.apply(q, *tables, interleave)
            keys, values = ExpandKeys.apply(kv, shared, *tables, plain, interleave)
            outs = [t.transpose(1, 2) for t in (queries, keys, values)]
        else:
            q_plain, q_rope = q.transpose(1, 2).split([plain, rope], dim=-1)
            k_plain, values = kv.transpose(1, 2).split([plain, value], dim=-1)
            turned = rotate(shared, tables, interleave).unsqueeze(1).expand(-1, heads, -1, -1)
            outs = [
                torch.cat((q_plain, rotate(q_rope, tables, interleave)), dim=-1),
                torch.cat((k_plain, turned), dim=-1),
                torch.nn.functional.pad(values, (0, plain + rope - value)),
            ]
        sum((out.float() * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
        found.append([*outs, q.grad, kv.grad, latent.grad])
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **close)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_join", {"PLAIN": 64, "HEADS": 16, "WIDTH": 128}),
        ("_shared_backward", {"PLAIN": 64, "HEADS": 16, "TURNED": 32}),
    ],
)
def test_every_kernel_compiles_for_a_gpu(
    name: str, constants: dict, interleave: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_moe.model.attention import triton

    kernel = getattr(triton, name)
    names = {parameter.name for parameter in kernel.params}
    kinds = {key: kind for key, kind in STRIDES.items() if key in names} | ({"way": "fp32"} if "way" in names else {})
    assert_compiles(kernel, constants | {"ROPE": 32, "INTERLEAVE": interleave}, kinds, tmp_path, monkeypatch)
