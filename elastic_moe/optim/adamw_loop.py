"""The loop of AdamW on a CPU: one pass over memory, compiled.

Every operation is one of IEEE's (add, multiply, divide, square root) and rounds once; see `plan/compiled.py`. So an
element's result does not depend on where it lies or on the width of the processor's vectors. torch offers neither: its
fused AdamW contracts to FMA in the vector body and not in the tail, and its square root on CPUs is MKL's, which is off
by one unit in the last place in one result of five.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled_for_vectors

Vector = NDArray[np.float32]


@compiled_for_vectors
def update(  # noqa: PLR0913 - compiled code sees plain arrays
    weight: Vector,
    m: Vector,
    v: Vector,
    grad: Vector,
    keep: np.float32,
    beta1: np.float32,
    rest1: np.float32,
    beta2: np.float32,
    rest2: np.float32,
    step_size: np.float32,
    root_scale: np.float32,
    eps: np.float32,
) -> None:
    """One update of weight, m and v in place.

    Args:
        weight, m, v, grad: fp32 [n] each, contiguous and without overlap.
        keep: factor of the weight: 1 without weight decay.
        beta1, rest1, beta2, rest2: factors of the old moment and of the gradient, or of its square.
        step_size, root_scale, eps: the step is `step_size * m / (root_scale * sqrt(v) + eps)`.
    """
    for i in range(len(weight)):
        g = grad[i]
        first = m[i] * beta1 + g * rest1
        second = v[i] * beta2 + (g * g) * rest2
        m[i], v[i] = first, second
        weight[i] = weight[i] * keep - (first * step_size) / (np.sqrt(second) * root_scale + eps)
