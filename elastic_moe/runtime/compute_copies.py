"""The dtype of the weights that a rank computes with.

Master weights and sums of gradients are fp32. A matrix that is only used in products has its copies in the dtype of the
products, so half as many bytes are published and kept in bf16. Autocast would round the same matrix alike in front of
each product, so no bit of a result changes; but where one matrix is used twice in a micro-batch, as the head is with
multi-token prediction, its gradients are summed in fp32 and no longer in bf16. Norms, embeddings, routers and the maps
of streams stay fp32.

A rank that is alone computes with its master weights, see `exchange/one_memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from elastic_moe.model.layers import Linear


def set_dtype(model: nn.Module, stacks: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Give the matrices of the model and the stacks of experts this dtype. Their values are to be published anew."""
    matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
    for parameter in (*matrices, *stacks):
        if parameter.dtype != dtype:
            grad, parameter.grad = parameter.grad, None  # a gradient has the dtype of its parameter, unless told:
            parameter.data = torch.zeros_like(parameter, dtype=dtype)
            parameter.grad_dtype = torch.float32
            parameter.grad = grad
