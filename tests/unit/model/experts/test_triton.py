"""The experts' Triton kernels against plain torch: by Triton's interpreter on CPU tensors, and compiled on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.model.experts.kernels import PLAIN
from elastic_moe.model.experts.routed_sum import Combine, Gather
from tests.triton_kernels import INTERPRETED, assert_compiles, run_interpreted

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in a process with the interpreter")
DTYPES = [torch.float32, torch.bfloat16]
LIMITED = {"LIMITED": True, "BLOCK": 64}


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}


@RUNS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (37, 130), (0, 16), (3, 1100)])
def test_swiglu(rows: int, width: int, limit: float, dtype: torch.dtype) -> None:
    from elastic_moe.model.experts import triton

    gate_up, grad = (randn(rows, 2 * width) * 2).to(dtype), randn(rows, width, seed=1).to(dtype)
    plain, _ = PLAIN
    torch.testing.assert_close(triton.swiglu(gate_up, limit), plain.forward(gate_up, limit), **close(dtype))
    ours, theirs = triton.swiglu_backward(grad, gate_up, limit), plain.backward(grad, gate_up, limit)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **close(dtype))


@RUNS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "choices", "width"), [(1, 1, 16), (23, 4, 130), (0, 2, 16), (5, 3, 1100)])
def test_sums_of_rows(tokens: int, choices: int, width: int, dtype: torch.dtype) -> None:
    """Values and gradients, through the autograd functions, of a permutation of all rows."""
    from elastic_moe.model.experts.triton import TritonSums

    place_TK = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    order_N = torch.argsort(place_TK)
    place_TK = place_TK.view(tokens, choices)
    found = []
    for sums in (TritonSums(), PLAIN[1]):
        x = randn(tokens, width).to(dtype).requires_grad_()
        gates = randn(tokens, choices, seed=1).sigmoid().requires_grad_()
        rows = Gather.apply(x, order_N, place_TK, sums)
        y = Combine.apply(rows * 2, place_TK, gates, sums)
        (y.float() * randn(tokens, width, seed=3)).sum().backward()
        found.append([y, x.grad, gates.grad])
    for mine, other in zip(*found, strict=True):
        scale = max(1.0, float(other.abs().max())) if len(other) else 1.0
        torch.testing.assert_close(mine / scale, other / scale, **close(dtype))


@pytest.mark.parametrize("tokens", [0, 7])
def test_the_backward_passes_are_those_of_autograd(tokens: int) -> None:
    """Plain torch, in fp64."""
    order_N = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(2))
    place_TK = torch.argsort(order_N).view(tokens, 3)
    x = torch.randn((tokens, 5), dtype=torch.float64).requires_grad_()
    gates = torch.rand((tokens, 3), dtype=torch.float64).requires_grad_()

    def routed(x_TD: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        return Combine.apply(Gather.apply(x_TD, order_N, place_TK, PLAIN[1]).sin(), place_TK, gates_TK, PLAIN[1])

    expected = (x.sin().unsqueeze(1) * gates.unsqueeze(2)).sum(dim=1)
    torch.testing.assert_close(routed(x, gates), expected)
    if tokens:
        assert torch.autograd.gradcheck(routed, (x, gates))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(
    ("name", "constants", "kinds"),
    [
        ("_swiglu", LIMITED, {"limit": "fp32"}),
        ("_swiglu_backward", LIMITED, {"limit": "fp32"}),
        ("_swiglu_backward", {**LIMITED, "LIMITED": False}, {"limit": "fp32"}),
        ("_routed_sum", {"GATED": True, "BLOCK": 64}, {"place_ptr": "*i64"}),
        ("_routed_sum_backward", {"BLOCK": 64}, {"place_ptr": "*i64"}),
    ],
)
def test_every_kernel_compiles_for_a_gpu(
    name: str, constants: dict, kinds: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_moe.model.experts import triton

    assert_compiles(getattr(triton, name), constants, kinds, tmp_path, monkeypatch)
