"""Choice of kernels: compiled ones equal the plain form, and a kernel that fails is replaced by it."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from elastic_moe.model.residual import kernels as kernels_module
from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.eager import EagerKernels
from tests.unit.model.residual.twins import example


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_equals_eager() -> None:
    compiled, eager = kernels_module.choose_kernels("compile", torch.device("cpu")), EagerKernels()
    x, weights, settings = example(4, 16, torch.float32)
    out_grad = torch.randn((7, 4, 16), generator=torch.Generator().manual_seed(9))
    results = []
    for form in (compiled, eager):
        streams, h, link = mhc.read(x, weights, settings, mhc.Segment(form, 1))
        out = mhc.write(streams, h.tanh(), link)
        results.append([out, *torch.autograd.grad(out, [x, *weights], out_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def fail(*_: object) -> object:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    form = kernels_module.compiled_kernels.__wrapped__()
    x, weights, settings = example(2, 4, torch.float32)
    with pytest.warns(UserWarning, match="no compiler here"):
        out = form.read(x, *weights, settings)
    torch.testing.assert_close(out, EagerKernels().read(x, *weights, settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        form.write(x, x[:, 0], out[1], out[2])


def test_the_choice_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked on a CPU; Triton's on a GPU, where they compile in seconds."""
    cpu, gpu, form = torch.device("cpu"), torch.device("cuda", 0), EagerKernels()
    monkeypatch.setattr(kernels_module, "triton_kernels", lambda: form)
    assert isinstance(kernels_module.choose_kernels("auto", cpu), kernels_module.BlockedKernels)
    assert kernels_module.choose_kernels("auto", gpu) is form
    assert kernels_module.choose_kernels("off", gpu) is not form
