"""The weights in a rank's slots, and their gradients.

Shapes: S slots of this rank, D hidden, F expert hidden.
"""

from __future__ import annotations

import torch

from elastic_moe.config.schema import ModelConfig

Pair = tuple[torch.Tensor, torch.Tensor]


class Slots:
    """Room for the weights of the experts in a rank's slots, all zeros at first.

    Args:
        num_layers: MoE layers.
        num_slots: of this rank, per layer.
        cfg: the model's shape.
        device: of the weights.
        exact: the gradients are fp64 sums of their own; else they are the weights' `grad`, in fp32.

    Attributes:
        params: per layer, (w_gate_up [S, 2F, D], w_down [S, D, F]): an expert's unit, one matrix after the other.
        grads: their gradients. The tensors are never replaced, only written to.
    """

    def __init__(
        self, num_layers: int, num_slots: int, cfg: ModelConfig, device: torch.device, exact: bool = False
    ) -> None:
        shapes = (num_slots, 2 * cfg.expert_hidden, cfg.hidden_size), (num_slots, cfg.hidden_size, cfg.expert_hidden)

        def zeros(dtype: torch.dtype) -> Pair:
            return torch.zeros(shapes[0], device=device, dtype=dtype), torch.zeros(
                shapes[1], device=device, dtype=dtype
            )

        parameters = [zeros(torch.float32) for _ in range(num_layers)]
        self.params = [(torch.nn.Parameter(gate_up), torch.nn.Parameter(down)) for gate_up, down in parameters]
        self.grads = [zeros(torch.float64 if exact else torch.float32) for _ in range(num_layers)]
        if not exact:
            for params, grads in zip(self.params, self.grads, strict=True):
                for parameter, grad in zip(params, grads, strict=True):
                    parameter.grad = grad

    def zero_grads(self) -> None:
        """Set the gradients to zero."""
        for tensor in (t for layer in self.grads for t in layer):
            tensor.zero_()


def most_rows(memory_limit: int, cfg: ModelConfig) -> int:
    """Rows of one layer that fit into so many bytes, their part kept for the backward pass included; 0 for no limit."""
    row_bytes = 4 * (3 * cfg.hidden_size + 4 * cfg.expert_hidden)
    return max(1, memory_limit // row_bytes) if memory_limit else 0
