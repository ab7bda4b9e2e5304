"""Weights in FP8 with a scale for each block, as DeepSeek publishes them (arXiv 2412.19437, section 3.3).

A weight W [O, I] is stored as e4m3 numbers beside `weight_scale_inv` [ceil(O / b), ceil(I / c)] for blocks of b x c;
its value is the number times the scale of its block. The blocks at the lower and right edges may be cut off.
"""

from __future__ import annotations

import torch

from elastic_moe.errors import UserError
from elastic_moe.model.hf.families import Json

FP8 = "F8_E4M3"
SCALES = {"F32", "BF16", "F16", "F8_E8M0"}  # types of the scales, as safetensors names them
Block = tuple[int, int]
_ALLOWED = {"quant_method": ("fp8",), "fmt": ("e4m3",), "activation_scheme": ("dynamic",), "expert_dtype": ("fp8",)}
_WITHOUT_MEANING = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "scale_fmt", "dequantize"}


def block_of(config: Json, where: str) -> Block | None:
    """Rows and columns of a block of the quantised weights; None where none are quantised.

    Raises:
        UserError: they are quantised in another way.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if config["model_type"] == "deepseek_v4":
        raise UserError(f"{where}: deepseek_v4 with quantization_config cannot be read; convert it to bf16 first.")
    for key, value in given.items():
        known = key in _WITHOUT_MEANING or key == "weight_block_size" or value in _ALLOWED.get(key, ())
        if value is not None and not known:
            raise UserError(f"{where}: quantization_config.{key}={value!r} cannot be read; convert to bf16 first.")
    block = given.get("weight_block_size", (128, 128))
    if given.get("quant_method") != "fp8" or not _is_block(block):
        raise UserError(
            f"{where}: quantization_config must be fp8 with a weight_block_size of two numbers; convert to bf16 first."
        )
    return block[0], block[1]


def _is_block(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)


def scale_name(weight: str) -> str:
    """Name of the scales of a weight; that of a fused one has no `.weight` at its end."""
    return f"{weight}_scale_inv"


def scale_shape(shape: tuple[int, ...], block: Block, parts: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., O, I] whose rows are `parts` matrices, each quantised by itself."""
    rows, columns = shape[-2] // parts, shape[-1]
    return (*shape[:-2], parts * -(-rows // block[0]), -(-columns // block[1]))


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """The fp32 value of one matrix; takes one such matrix of memory besides its arguments.

    Args:
        weight: e4m3 [O, I].
        scale: [ceil(O / b), ceil(I / c)].
        block: (b, c).
    """
    out, scale = weight.float(), scale.float()
    for row, scales in enumerate(scale):
        wide = scales.repeat_interleave(block[1])[: out.shape[1]]
        out[row * block[0] : (row + 1) * block[0]] *= wide
    return out
