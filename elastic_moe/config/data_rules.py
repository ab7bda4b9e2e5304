"""Rules of the keys in `data` that go beyond ranges and choices."""

from __future__ import annotations

from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.errors import UserError

STDLIB = "stdlib"
SHARE_BITS = 20  # to which shares are rounded, see `plan.batch.mixture_at`
LEAST_SHARE = 2.0**-SHARE_BITS
TOKENIZERS = ("bpe", "bytes", "ids")  # that are no path


def check_data(data: DataConfig, inputs: bool) -> None:
    """Check the corpora and the tokenizer.

    Args:
        data: the configuration.
        inputs: they have to be there.

    Raises:
        UserError: a weight is not above 0 or too small, two keys or two names mean a corpus, or something is not there.
    """
    for name, weight in data.mixture.items():
        if weight <= 0:
            raise UserError(f"data.mixture must have weights above 0, not {weight!r} for {name!r}.")
        if weight < LEAST_SHARE * sum(data.mixture.values()):
            raise UserError(
                f"data.mixture must have shares of at least {LEAST_SHARE:g} each, and {weight!r} for {name!r} is less: "
                "leave it out, or give it more."
            )
    if data.mixture and data.corpus != DataConfig().corpus:
        raise UserError("data.mixture takes the place of data.corpus: name that one in data.mixture, with its weight.")
    if not inputs:
        return
    places = [name if "://" in name else Path(name).expanduser().resolve().as_posix() for name in data.mixture]
    if twice := [name for name, place in zip(data.mixture, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"data.mixture names one corpus as {' and as '.join(twice)}: give it once, with their sum.")
    for corpus in data.mixture or [data.corpus]:
        there = corpus == STDLIB or "://" in corpus or (corpus.strip() and Path(corpus).expanduser().exists())
        if not there:
            key = "data.mixture" if data.mixture else "data.corpus"
            raise UserError(
                f'{key} names {corpus!r}, which does not exist: give a text file, a directory, a URL or "{STDLIB}".'
            )
    path = Path(data.tokenizer).expanduser()
    if data.tokenizer not in TOKENIZERS and not (path / "tokenizer.json" if path.is_dir() else path).is_file():
        raise UserError(
            f'data.tokenizer must be "bpe", "bytes", "ids", a tokenizer.json or its directory, not {data.tokenizer!r}.'
        )
