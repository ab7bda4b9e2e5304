"""A file of a corpus, or a part of one, as a value that can be sent to another process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TEXT, LINES, ARRAY, PARQUET, ARROW = "text", "lines", "array", "parquet", "arrow"
MEGATRON, TOKENS = "megatron", "tokens"
OF_TOKENS = (MEGATRON, TOKENS)
TRAIN_ONLY, VAL_ONLY = "train", "val"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus, or consecutive units of it.

    Attributes:
        path: a path or a URL.
        name: path relative to the corpus.
        size: bytes of the file, -1 where a server does not tell; with `mtime_ns` it identifies its content.
        mtime_ns: time of its last change, or what a server tells instead.
        kind: how it is read.
        encoding: of text and of lines, by Python's name; of a flat file of tokens without a header the type of its ids.
        codec: by which it is compressed; "": it is not.
        begin: first unit that is read: a byte of text or of lines, a row group of Parquet, a record batch of Arrow, a
            document of Megatron, a token of a flat file.
        count: units that are read; 0: the file is read whole.
        split: it is for training or for validation alone; "": its text is divided.
        weight: bytes of the units, of all without `count`.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    kind: str = TEXT
    encoding: str = "utf-8"
    codec: str = ""
    begin: int = 0
    count: int = 0
    split: str = ""
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive text of a corpus that one process encodes.

    Attributes:
        number: 0, 1, 2, ... in the order of the token stream.
        files: whole files and parts of files.
        offset: bytes of the corpus before it.
        corpus: index of the corpus in a mixture.
        limit: characters of the corpus that are read; 0: all.
    """

    number: int
    files: tuple[SourceFile, ...]
    offset: int = 0
    corpus: int = 0
    limit: int = 0

    @property
    def weight(self) -> int:
        """Bytes of source."""
        return sum(file.weight or max(file.size, 0) for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Part:
        files = tuple(SourceFile(**file) for file in value["files"])
        return Part(**{**value, "files": files})
