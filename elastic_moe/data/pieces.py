"""Pieces of a corpus: a whole document, or consecutive whole lines of a long one. Each belongs to training or to
validation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TextIO, cast

import numpy as np
from numpy.typing import NDArray

from elastic_moe.data import tables
from elastic_moe.data.location import has_changed
from elastic_moe.data.source_file import ARROW, OF_TOKENS, PARQUET, VAL_ONLY, SourceFile
from elastic_moe.data.text_file import UNREADABLE, documents, unreadable
from elastic_moe.data.token_file import read_ids
from elastic_moe.errors import UserError

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 512, 65536


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of one document.

    Attributes:
        text: the text; "" where the corpus holds tokens.
        ends: true if the document ends here.
        ids: tokens of another trainer's corpus; None: it holds text.
        split: the piece is for training or for validation alone; "": that is not decided.
    """

    text: str
    ends: bool
    ids: NDArray[np.integer] | None = None
    split: str = ""

    @property
    def size(self) -> int:
        """Characters, or bytes of another trainer's tokens."""
        return len(self.text) if self.ids is None else self.ids.nbytes


def piece_bytes(total_bytes: int, val_fraction: float) -> int:
    """Characters per piece: few enough that the validation text is several pieces from all parts of the corpus."""
    return int(min(max(total_bytes * val_fraction / 8, MIN_PIECE_BYTES), MAX_PIECE_BYTES))


def read_pieces(
    files: Iterable[SourceFile], max_bytes: int, size: int, text_field: str = "", keep: NDArray[np.bool_] | None = None
) -> Iterator[Piece]:
    """Read the corpus, piece by piece, with only one piece in memory at a time.

    Args:
        files: the files, in order.
        max_bytes: stop after about this many characters; 0 for no limit.
        size: characters after which a piece ends, at the end of the line.
        text_field: name of the field or column with the text; "": the usual ones.
        keep: of each document, whether it is read; None: all are.

    Raises:
        UserError: a file cannot be read, or has no text where it should.
    """
    left, seen = max_bytes or -1, 0
    for file in files:
        try:
            for document, ends in _documents(file, text_field, size):
                seen += 1
                if keep is not None and not keep[seen - 1]:
                    continue
                pieces = [Piece("", ends, document)] if isinstance(document, np.ndarray) else ()
                for piece in pieces or _cut(cast(TextIO, document), ends, size, left):
                    yield replace(piece, split=file.split) if file.split else piece
                    if left > 0:
                        left = max(left - piece.size, 0)
                if left == 0:
                    break
            _check_unchanged(file)
        except UNREADABLE as error:
            raise unreadable(file.path, error) from error
        if left == 0:
            return


def read_documents(files: Iterable[SourceFile], text_field: str) -> Iterator[TextIO]:
    """The documents of some files as streams of text, in the order in which `read_pieces` counts them.

    Raises:
        UserError: a file cannot be read, or has no text where it should.
    """
    for file in files:
        try:
            for document, _ in _documents(file, text_field, MAX_PIECE_BYTES):
                assert not isinstance(document, np.ndarray), "duplicates among tokens are not looked for"
                yield document
            _check_unchanged(file)
        except UNREADABLE as error:
            raise unreadable(file.path, error) from error


def _check_unchanged(file: SourceFile) -> None:
    """Refuse a file that was written while it was read: nobody knows which of its bytes are old.

    Raises:
        UserError: it was.
        OSError: that cannot be seen.
    """
    if has_changed(file.path, file.size, file.mtime_ns):
        raise UserError(
            f"data.corpus: {file.path} has changed while it was read; start again when nothing writes to it."
        )


def _documents(file: SourceFile, text_field: str, size: int) -> Iterator[tuple[TextIO | NDArray[np.integer], bool]]:
    """The documents of a file, as text or as about `size` bytes of ids, each with whether it ends there."""
    if file.kind in OF_TOKENS:
        for one in read_ids(file, size):
            yield one.ids, one.ends
    elif file.kind in (PARQUET, ARROW):
        yield from tables.rows(file, text_field)
    else:
        yield from documents(file, text_field)


def _cut(text: TextIO, ends: bool, size: int, left: int) -> Iterator[Piece]:
    """A document in pieces of about `size` characters, at most about `left` of them (below 0: no limit)."""
    held: str | None = None
    while left != 0:
        wanted = size if left < 0 else min(size, left)
        chunk = text.read(wanted)
        if not chunk:
            break
        if wanted == size and not chunk.endswith("\n"):
            chunk += text.readline(MAX_PIECE_BYTES)
        if left > 0:
            left = max(left - len(chunk), 0)
        if held is not None:
            yield Piece(held, ends=False)
        held = chunk
    if held is not None:
        yield Piece(held, ends)


class ValidationSplit:
    """Chooses pieces for validation, such that their share of the text is close to a fraction at every point.

    Args:
        val_fraction: the fraction.
        offset: size of the corpus before the first piece, which is taken for divided into whole pieces.
        size: of such a piece.
    """

    def __init__(self, val_fraction: float, offset: int = 0, size: int = 1) -> None:
        self._fraction, self._total = val_fraction, offset
        self._val = size * int(val_fraction * offset / size + 0.5)

    def is_val(self, piece: Piece) -> bool:
        """Whether the next piece is for validation."""
        if piece.split:
            return piece.split == VAL_ONLY
        size = piece.size
        # Half a piece early: the first validation piece then lies in the middle of its share of the corpus.
        val = self._val + size / 2 <= self._fraction * (self._total + size) and self._total > 0
        self._total += size
        self._val += size if val else 0
        return val
