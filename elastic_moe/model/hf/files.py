"""The safetensors files of a Hugging Face directory, and what their headers say.

The files come from strangers, so every fault of theirs is one sentence that names the file. Only safetensors are read:
files of pickles (`.bin`, `.pt`) could run code. The library checks that a header's tensors lie in the file without
holes or overlaps, so reading one never takes more memory than the file is large.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from elastic_moe.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_JSON = 1 << 28  # bytes; the index of a model of 100,000 tensors has some ten million
FLOATS = {"F64", "F32", "F16", "BF16"}
INTEGERS = {"I64", "I32", "I16", "U8"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor. Attributes: the file's name, the shape, and the type as safetensors names it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object.

    Raises:
        UserError: it is not one, or cannot be read.
    """
    try:
        _require_file(path)
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} has {path.stat().st_size} bytes, more than any such file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def list_files(directory: Path) -> list[str]:
    """Names of the files that hold a directory's weights.

    Raises:
        UserError: there are none, or the index is damaged or names something else than files beside it.
    """
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).exists():
            return [SINGLE]
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}.")
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} is damaged: it has no weight_map.")
    for name in placed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no safetensors file beside it.")
    return sorted(set(placed.values()))


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, by name.

    Raises:
        UserError: a file cannot be read, or two files hold a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in list_files(directory):
        with opened(directory / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name in found:
                    raise UserError(f"{directory}: tensor {name} is in both {found[name].file} and {file}.")
                part = tensors.get_slice(name)
                found[name] = StoredTensor(file, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def read_tensor(
    directory: Path, name: str, stored: StoredTensor, index: tuple[int, slice] | None = None
) -> torch.Tensor:
    """One tensor's value, or the part at an index, of which alone the bytes are read.

    Raises:
        UserError: the file cannot be read any more.
    """
    with opened(directory / stored.file) as tensors:
        return tensors.get_tensor(name) if index is None else tensors.get_slice(name)[index]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}.") from error


def _require_file(path: Path) -> None:
    """Check that there is a file and nothing else: to open a pipe would hang, and a device may have no end.

    Raises:
        UserError: there is something else.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
