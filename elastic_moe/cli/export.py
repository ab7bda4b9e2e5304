"""A run's weights as a Hugging Face checkpoint: `elastic-moe export RUN_OR_CHECKPOINT --to DIR`.

Writes safetensors, config.json and the tokenizer, which `transformers` loads with `from_pretrained`. Tensors are read
and written one by one, so the model need not fit into memory. A model that no family of transformers can express (mHC
with MLA, for example) is written with code of its own, which `from_pretrained(..., trust_remote_code=True)` runs. In a
family of transformers, the weights of multi-token prediction are left out, because there is no place for them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from elastic_moe.data.tokenizer import BpeTokenizer, BytesTokenizer
from elastic_moe.errors import UserError
from elastic_moe.model.hf.checkpoint import write_checkpoint
from elastic_moe.model.hf.config_json import family_of
from elastic_moe.model.hf.families import OWN
from elastic_moe.saved import open_model
from elastic_moe.types import ParamSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(source: str, target: str, step: int | None, dtype: torch.dtype) -> str:
    """Write the checkpoint, whole or not at all. Returns one line about the result.

    Raises:
        UserError: no such run or checkpoint, a model that cannot be expressed, or a target that cannot be written.
    """
    saved, directory = open_model(source, step), Path(target).expanduser().absolute()
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--to names {target}, which is not empty.")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def progress(specs: Iterable[ParamSpec]) -> Iterable[ParamSpec]:
        return tqdm(list(specs), desc="exporting", unit="tensor", disable=None)

    try:
        partial.mkdir(parents=True)
        left = write_checkpoint(partial, saved.cfg, saved.read, saved.seq_len or 4096, dtype, progress=progress)
        if isinstance(saved.tokenizer, BpeTokenizer):
            saved.tokenizer.export(partial)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise UserError(f"--to names {target}, which cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    notes = f"; {len(left)} tensors of the multi-token prediction were left out" if left else ""
    if isinstance(saved.tokenizer, BytesTokenizer):
        notes += "; tokens are bytes, for which transformers needs no file: id 0 to 255, and 256 ends a document"
    if family_of(saved.cfg) == OWN:
        notes += "; transformers loads it with trust_remote_code=True"
    return f"{saved.what} is now in {target}{notes}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="elastic-moe export", description="Write a run's weights as a Hugging Face checkpoint."
    )
    parser.add_argument("source", help="a run directory, or one of its checkpoints")
    parser.add_argument("--to", required=True, metavar="DIR", help="directory to write; must not exist or be empty")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest one if not given")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    options = parser.parse_args(arguments)
    try:
        print(export(options.source, options.to, options.step, DTYPES[options.dtype]))
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
