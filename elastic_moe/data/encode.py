"""From one part of a corpus to its tokens: what one process does at a time.

The tokens of a part follow from the part and the settings alone, never from who encodes it or when. They lie in two
files of the working directory, for training and for validation, and a record says what they are. The record is written
last, under a temporary name that is renamed, so a part with a record is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe.data.pieces import Piece, ValidationSplit, read_pieces
from elastic_moe.data.shards import TokenShardWriter
from elastic_moe.data.source_file import Part
from elastic_moe.data.tokenizer import TextTokenizer
from elastic_moe.errors import UserError

TRAIN, VAL = "train", "val"
BATCH_CHARACTERS = 1 << 20  # that are encoded at once; the tokenizer's threads share them


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What the tokens of a part depend on, besides the part. It can be sent as JSON.

    Attributes:
        directory: takes the part's files; has the saved tokenizer.
        piece_bytes: characters of a piece.
        val_fraction: part of the text that is for validation.
        text_field: name of the field or column with the text; "": the usual ones.
        dedup: how duplicates are found, as `data.dedup`.
    """

    directory: str
    piece_bytes: int
    val_fraction: float
    text_field: str = ""
    dedup: str = "off"


@dataclass
class TextStats:
    """What was read, as sums.

    Attributes:
        documents: that ended.
        characters: of text, or bytes of another trainer's tokens.
        size: in UTF-8, or in the other's tokens, bytes.
        unknown: characters U+FFFD, for bytes that could not be decoded.
        train, val: tokens.
    """

    documents: int = 0
    characters: int = 0
    size: int = 0
    unknown: int = 0
    train: int = 0
    val: int = 0

    def add(self, other: TextStats) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part that is encoded. `sums` are the checksums of its files for training and for validation."""

    number: int
    corpus: int
    first_file: str
    sums: tuple[str, str]
    stats: TextStats = field(default_factory=TextStats)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> PartRecord:
        sums = value["sums"]
        return PartRecord(**{**value, "sums": (sums[0], sums[1]), "stats": TextStats(**value["stats"])})


def part_path(directory: str | Path, number: int, what: str) -> Path:
    """Path of a file of a part; `what`: train, val, json, pieces, prints or keep."""
    return Path(directory) / f"part-{number:06d}.{what}"


def read_record(directory: str | Path, part: Part) -> PartRecord | None:
    """The record of a part, if it is encoded; its files are not looked into."""
    try:
        record = PartRecord.from_json(json.loads(part_path(directory, part.number, "json").read_text()))
        known = record.number == part.number and record.corpus == part.corpus
        there = all(part_path(directory, part.number, what).is_file() for what in (TRAIN, VAL))
        return record if known and there else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_part(
    part: Part, settings: EncodeSettings, tokenizer: TextTokenizer, told: Callable[[int], object]
) -> PartRecord:
    """Encode a part into the files of the working directory.

    Args:
        part: of the corpus.
        settings: what the tokens depend on besides.
        tokenizer: that of the working directory.
        told: is told again and again how many bytes of text are done.

    Raises:
        UserError: a file cannot be read, or has no text where it should.
        OSError: the directory cannot be written.
    """
    directory, rows = settings.directory, np.zeros((0, 6), np.int64)
    final = {what: part_path(directory, part.number, what) for what in (TRAIN, VAL, "json", "pieces")}
    ours = {what: path.with_name(f".{path.name}-{os.getpid()}") for what, path in final.items()}
    try:
        writers = [TokenShardWriter(ours[what], tokenizer.vocab_size) for what in (TRAIN, VAL)]
        try:
            stats, kept = _write(part, settings, tokenizer, writers, told)
            rows = np.array(kept, np.int64).reshape(-1, 6)
        finally:
            for writer in writers:
                writer.abandon()
        sums = writers[0].sha256, writers[1].sha256
        record = PartRecord(part.number, part.corpus, part.files[0].name, sums, stats)
        ours["json"].write_text(json.dumps(record.to_json()), encoding="utf-8")
        if part.limit:
            with ours["pieces"].open("wb") as stream:
                np.save(stream, rows)
        for what in ("pieces", TRAIN, VAL, "json"):
            if ours[what].exists():
                os.replace(ours[what], final[what])
        return record
    finally:
        for path in ours.values():
            path.unlink(missing_ok=True)


def _write(
    part: Part,
    settings: EncodeSettings,
    tokenizer: TextTokenizer,
    writers: list[TokenShardWriter],
    told: Callable[[int], object],
) -> tuple[TextStats, list[tuple[int, ...]]]:
    """Write the tokens of a part. Returns the sums, and with a limit the sums after each piece."""
    split = ValidationSplit(settings.val_fraction, part.offset, settings.piece_bytes)
    path = part_path(settings.directory, part.number, "keep")
    keep = np.load(path) if settings.dedup != "off" and path.exists() else None
    pieces = read_pieces(part.files, part.limit, settings.piece_bytes, settings.text_field, keep)
    stats, rows = TextStats(), []
    for batch in _batches(pieces):
        for piece, ids in zip(batch, _encoded(batch, tokenizer), strict=True):
            writer = writers[split.is_val(piece)]
            writer.append(ids)
            ended = piece.ids is not None and len(ids) > 0 and ids[-1] == tokenizer.end_id
            if piece.ends and tokenizer.end_id >= 0 and not ended:
                writer.append([tokenizer.end_id])
            stats.documents += piece.ends
            stats.characters += piece.size
            stats.size += len(piece.text.encode()) if piece.ids is None else piece.ids.nbytes
            stats.unknown += piece.text.count("\ufffd")
            if part.limit:
                rows.append((stats.documents, stats.characters, stats.size, stats.unknown, *_tokens(writers)))
            told(stats.size)
    stats.train, stats.val = _tokens(writers)
    return stats, rows


def _tokens(writers: list[TokenShardWriter]) -> tuple[int, int]:
    return writers[0].tokens, writers[1].tokens


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.size
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Piece], tokenizer: TextTokenizer) -> Iterator[NDArray[np.integer]]:
    vocab_size = tokenizer.vocab_size
    encoded = iter(tokenizer.encode_arrays([piece.text for piece in batch if piece.ids is None]))
    for piece in batch:
        if piece.ids is None:
            yield next(encoded)
            continue
        if len(piece.ids) and not 0 <= (low := int(piece.ids.min())) <= (high := int(piece.ids.max())) < vocab_size:
            if low < 0:
                raise UserError(f"data.corpus holds the token {low}, which no tokenizer has: it is damaged.")
            raise UserError(
                f"data.corpus holds the token {high}, and data.tokenizer has only {vocab_size}: name the tokenizer "
                "that made them, or a larger data.vocab_size."
            )
        yield piece.ids


def shortened(record: PartRecord, directory: str | Path, limit: int) -> PartRecord:
    """The record of the first pieces of a part, as many as have `limit` characters."""
    rows = np.load(part_path(directory, record.number, "pieces"))
    if limit <= 0 or not len(rows):
        return replace(record, stats=TextStats())
    row = rows[min(int(np.searchsorted(rows[:, 1], limit)), len(rows) - 1)]
    return replace(record, stats=TextStats(*map(int, row)))
