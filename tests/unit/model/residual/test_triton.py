"""The Triton kernels against the plain torch form: values and gradients.

Triton's interpreter runs them on CPU tensors. It shows neither their speed nor the result of their compilation. On a
machine with a GPU they are compiled and run there too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.eager import EagerKernels, Kernels, MixSettings
from tests.triton_kernels import INTERPRETED, assert_compiles, run_interpreted

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("runs in a process with the interpreter")
    from elastic_moe.model.residual.triton import TritonKernels

    return TritonKernels()


CASES = [
    (5, 4, 40, torch.float32), (33, 2, 130, torch.float32), (17, 4, 64, torch.bfloat16), (1, 4, 1100, torch.float32),
]  # fmt: skip
LARGE = [(2048, 4, 2560, torch.float32), (2048, 4, 2560, torch.bfloat16)] if DEVICE == "cuda" else []


@pytest.mark.parametrize(("tokens", "n", "width", "dtype"), [*CASES, *LARGE])
def test_equals_plain_torch(kernels: Kernels, tokens: int, n: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    k = 2 * n + n * n
    settings, plain = MixSettings(n, 4, 1e-4, 1e-6), EagerKernels()

    def random(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, kind)

    x, y, grad, d_h = (
        random(*s, kind=dtype) for s in ((tokens, n, width), (tokens, width), (tokens, n, width), (tokens, width))
    )
    weights = mhc.Weights(random(k, n * width) / width**0.5, random(k) * 0.3, random(3))
    exact = dtype == torch.float32
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if exact else {"rtol": 3e-2, "atol": 6e-2}

    fast, slow = (form.read(x, *weights, settings) for form in (kernels, plain))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    _, post, res, u, r = slow
    d_post, d_res = random(tokens, n), random(tokens, n, n)
    fast, slow = (
        form.read_backward(x, (grad, d_h, d_post, d_res), (u, r), tuple(weights), settings) for form in (kernels, plain)
    )
    for a, b in zip(fast, slow, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / scale, b / scale, **tolerance)
    torch.testing.assert_close(kernels.write(x, y, post, res), plain.write(x, y, post, res), **tolerance)
    fast, slow = (form.write_backward(grad, x, y, post, res) for form in (kernels, plain))
    for a, b in zip(fast, slow, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / scale, b / scale, **tolerance)


BLOCKS = {"N": 4, "BLOCK": 64}
SIZES = {
    "project": {"ROWS": 32, "PADDED": 32, "BLOCK": 128},
    "coefficients": {"N": 4, "SMALL": 32},
    "coefficients_backward": {"N": 4, "SMALL": 32},
    "collapse": BLOCKS,
    "write": BLOCKS,
    "write_backward": BLOCKS,
    "pre_backward": BLOCKS,
    "read_backward": {**BLOCKS, "BLOCK": 128, "ROWS": 32, "PADDED": 32},
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_kernel_compiles_for_a_gpu(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_moe.model.residual import triton_jit

    kernel = getattr(triton_jit, name)
    constants = dict(SIZES[name])
    if any(parameter.name == "PRECISION" for parameter in kernel.params):
        constants["PRECISION"] = precision
    elif precision != "tf32":
        pytest.skip("has no products")
    assert_compiles(kernel, constants, {"eps": "fp32"}, tmp_path, monkeypatch)
