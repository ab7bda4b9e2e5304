"""Where the files of a Hugging Face directory hold a parameter: a whole tensor, or a part of a fused one.

The experts of a layer may be fused, as newer versions of transformers keep them: `experts.gate_up_proj` [E, 2F, D] with
the rows of gate before those of up, and `experts.down_proj` [E, D, F]. A parameter that is a part is read alone, so no
fused tensor is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_moe.errors import UserError
from elastic_moe.model.hf.files import FLOATS, StoredTensor, read_tensor
from elastic_moe.model.hf.quantized import FP8, SCALES, Block, dequantize, scale_name, scale_shape

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r".*\.experts\.(gate_up|down)_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a matrix.

    Attributes:
        name: of the tensor.
        expert: index along its first axis; None for a whole tensor.
        part: which of `parts` equal ranges of the rows.
        parts: matrices that lie below one another in the tensor.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def aliases(name: str) -> Iterator[str]:
    """A tensor's name in transformers, and its name in DeepSeek's own V4 files."""
    yield name
    bare = name.removeprefix("model.")
    yield (
        bare.replace("embed_tokens.", "embed.")
        .replace("hc_head.hc_", "hc_head_")
        .replace("attn.norm.", "attn.kv_norm.")
    )


def find(name: str, stored: Mapping[str, StoredTensor]) -> Place:
    """The place of their parameter `name`; one that is nowhere gets its own name."""
    for alias in aliases(name):
        if alias in stored:
            return Place(alias)
    if match := _EXPERT.fullmatch(name):
        both = match[3] != "down"
        fused = f"{match[1]}.{'gate_up' if both else 'down'}_proj"
        if fused in stored:
            return Place(fused, int(match[2]), int(match[3] == "up"), 1 + both)
    return Place(name)


def count(stored: Mapping[str, StoredTensor]) -> int:
    """Number of tensors, a fused one counted once for each expert."""
    return sum(t.shape[0] if _FUSED.fullmatch(name) and t.shape else 1 for name, t in stored.items())


class StoredWeights:
    """The tensors of a directory by their places, quantised or not.

    Args:
        directory: of the files.
        stored: the headers.
        block: of the quantised tensors; None if there are none.
    """

    def __init__(self, directory: Path, stored: Mapping[str, StoredTensor], block: Block | None) -> None:
        self._directory, self._stored, self._block = directory, stored, block

    def check(self, place: Place, shape: tuple[int, ...], experts: int, types: set[str] = FLOATS) -> Iterator[str]:
        """The names of the tensors that a parameter takes, after their shapes and types are checked.

        Args:
            place: of the parameter.
            shape: of the parameter.
            experts: number of experts in a layer.
            types: that the parameter may have besides FP8, as safetensors names them.

        Raises:
            UserError: a tensor is missing, or has another shape or type.
        """
        if place.expert is not None:
            shape = (experts, place.parts * shape[0], *shape[1:])
        tensor = self._get(place.name, shape)
        yield place.name
        if tensor.dtype == FP8 and self._block is not None and len(shape) > 1:
            scales = scale_name(place.name)
            scale = self._get(scales, scale_shape(shape, self._block, place.parts))
            yield scales
            if scale.dtype not in SCALES:
                raise UserError(f"{self._directory / scale.file}: {scales} has type {scale.dtype}.")
        elif tensor.dtype not in types:
            raise UserError(f"{self._directory / tensor.file}: {place.name} has type {tensor.dtype}.")

    def _get(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        if name not in self._stored:
            raise UserError(f"{self._directory} has no tensor {name}.")
        if self._stored[name].shape != shape:
            raise UserError(f"{self._directory}: {name} is {self._stored[name].shape}, not {shape}.")
        return self._stored[name]

    def read(self, place: Place) -> torch.Tensor:
        """The fp32 value at a place that was checked."""
        weight = self._read(place.name, place)
        if self._block is None or self._stored[place.name].dtype != FP8:
            return weight.float()
        return dequantize(weight, self._read(scale_name(place.name), place), self._block)

    def _read(self, name: str, place: Place) -> torch.Tensor:
        rows = self._stored[name].shape[-2] // place.parts if place.parts > 1 else 0
        part = slice(place.part * rows, (place.part + 1) * rows) if rows else slice(None)
        index = None if place.expert is None else (place.expert, part)
        return read_tensor(self._directory, name, self._stored[name], index)
