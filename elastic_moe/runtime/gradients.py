"""Sums of the dense parameters' gradients over the micro-batches of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from elastic_moe.parallel.reproducible import Grid


class DenseGradients:
    """Sums over micro-batches: in the parameters' own `grad`, or, with a grid, in separate fp64 tensors.

    Args:
        model: its parameters get `grad` tensors that are never replaced.
        grid: makes the sums independent of their order.

    Attributes:
        tensors: parameter name -> sum, of the parameter's shape and on its device.
    """

    def __init__(self, model: nn.Module, grid: Grid | None) -> None:
        self._grid = grid
        self._parameters = dict(model.named_parameters())
        self._grads: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.grad = self._grads[name] = torch.zeros_like(parameter)
        self.tensors = {n: g.double() for n, g in self._grads.items()} if grid else self._grads

    @contextmanager
    def telling(self, told: Callable[[str], None] | None) -> Generator[None]:
        """Meanwhile, call this with the name of each parameter to which a backward pass has added its gradient."""
        with ExitStack() as hooks:
            if told is not None:
                for name, parameter in self._parameters.items():
                    hook = parameter.register_post_accumulate_grad_hook(lambda _, name=name: told(name))
                    hooks.callback(hook.remove)
            yield

    def zero(self) -> None:
        """Set all sums to zero, at the beginning of a step."""
        sums = () if self.tensors is self._grads else self.tensors.values()
        torch._foreach_zero_([*self._grads.values(), *sums])  # pyright: ignore[reportPrivateImportUsage]

    def finite(self) -> bool:
        """Whether all sums are finite.

        One pass over them, by their lengths: torch is 20 times as fast with these as with the largest of each. A length
        may overflow where the numbers do not; then the largest decide.
        """

        def all_finite(order: float) -> bool:
            norms = torch._foreach_norm(list(self.tensors.values()), order)  # pyright: ignore[reportPrivateImportUsage]
            return bool(torch.stack(norms).isfinite().all())

        return all_finite(2) or all_finite(math.inf)

    def add(self) -> None:
        """Add the gradients of a micro-batch, after its backward pass."""
        if self._grid is None:
            return
        for name, grad in self._grads.items():
            self._grid.add(self.tensors[name], grad)
            grad.zero_()
