"""Puts the parts of a corpus together, in their order, into one file for training and one for validation.

A journal (`parts.jsonl`) has a line for each part that is in the files: where it came from, how many tokens it has, and
the checksums of both files after it. Lines are written when the tokens are on the disk, about every second, and then
the parts' own files are deleted. So a process that is killed at any point is followed by one that cuts the files off
behind the last line, compares their checksums with it, and goes on with the next part: no byte is lost, none is there
twice.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_moe.data.encode import TRAIN, VAL, PartRecord, TextStats, part_path
from elastic_moe.data.shards import TokenShardWriter, file_sha256, note_checked, token_dtype

FILES = {TRAIN: "train.bin", VAL: "val.bin"}
JOURNAL = "parts.jsonl"
COMMIT_S = 1.0  # seconds between two times that what was appended is written to the disk
_CHUNK = 1 << 22


class Damaged(Exception):
    """Files of the working directory are not what its records say."""


class Assembly:
    """The two files, as far as they are written.

    Args:
        directory: the working directory.
        vocab_size: tokens are below it.

    Attributes:
        records: of the parts that are in the files, in order.
        total: of what was read for them.

    Raises:
        Damaged: the files do not fit the journal.
        OSError: the directory cannot be read or written.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._directory, self._width = directory, token_dtype(vocab_size).itemsize
        self.records, sums, length = _read_journal(directory / JOURNAL)
        self.total = TextStats()
        for record in self.records:
            self.total.add(record.stats)
        kept = {TRAIN: self.total.train, VAL: self.total.val}
        self._writers: dict[str, TokenShardWriter] = {}
        try:
            for what, name in FILES.items():
                self._writers[what] = TokenShardWriter(directory / name, vocab_size, kept[what])
        except OSError as error:
            self.close()
            raise Damaged(str(error)) from error
        if any(kept.values()) and sums != self._sums():
            self.close()
            raise Damaged(f"{directory} has other tokens than its journal says")
        self._journal = (directory / JOURNAL).open("r+b" if length else "wb")
        self._journal.truncate(length)
        self._journal.seek(length)
        self._pending: list[tuple[int, bytes]] = []  # number and line of parts that are not in the journal yet
        self._characters = Counter[int]()
        for record in self.records:
            self._characters[record.corpus] += record.stats.characters
        self._committed_s = time.monotonic()

    def characters(self, corpus: int) -> int:
        """Characters of a corpus that are in the files."""
        return self._characters[corpus]

    def close(self) -> None:
        """Close the files as they are; what was appended is kept for the next time."""
        if hasattr(self, "_journal"):
            with suppress(OSError):
                self._commit()
        for writer in self._writers.values():
            writer.abandon()
        if hasattr(self, "_journal"):
            self._journal.close()

    def append(self, record: PartRecord, cut: PartRecord | None = None) -> None:
        """Append the tokens of a part.

        Args:
            record: of the part, whose files are in the directory.
            cut: the same for its first tokens alone; None: all are appended.

        Raises:
            Damaged: the part's files are not those of the record.
        """
        paths = {what: part_path(self._directory, record.number, what) for what in FILES}
        if any(file_sha256(paths[what]) != wanted for what, wanted in zip(FILES, record.sums, strict=True)):
            raise Damaged(f"part {record.number} is not what its record says")
        taken = cut or record
        for what, tokens in ((TRAIN, taken.stats.train), (VAL, taken.stats.val)):
            left = tokens * self._width
            with paths[what].open("rb") as stream:
                while left:
                    data = stream.read(min(_CHUNK, left))
                    self._writers[what].append_bytes(data)
                    left -= len(data)
        self.records.append(taken)
        self.total.add(taken.stats)
        self._characters[record.corpus] += taken.stats.characters
        line = json.dumps(taken.to_json() | {"sums": self._sums()}) + "\n"
        self._pending.append((record.number, line.encode()))
        if time.monotonic() - self._committed_s >= COMMIT_S:
            self._commit()

    def _commit(self) -> None:
        """Bring what was appended to the disk, then into the journal, and delete the parts' own files."""
        for writer in self._writers.values():
            writer.sync()
        self._journal.write(b"".join(line for _, line in self._pending))
        self._journal.flush()
        self._remove([number for number, _ in self._pending])
        self._pending.clear()
        self._committed_s = time.monotonic()

    def finish(self, corpora: Sequence[str]) -> None:
        """Write the indexes.

        Args:
            corpora: names of the corpora of a mixture, in order; () for a single corpus.
        """
        self._commit()
        for what, name in FILES.items():
            tokens = [0] * len(corpora)
            for record in self.records if corpora else ():
                tokens[record.corpus] += getattr(record.stats, what)
            path, writer = self._directory / name, self._writers[what]
            writer.close(list(zip(corpora, tokens, strict=True)))
            note_checked(path, writer.sha256, settled=True)
        self._journal.close()
        for pattern in ("part-*", ".part-*"):
            for path in self._directory.glob(pattern):
                path.unlink(missing_ok=True)

    def _sums(self) -> list[str]:
        return [self._writers[what].sha256 for what in FILES]

    def _remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for what in (*FILES, "json", "pieces"):
                part_path(self._directory, number, what).unlink(missing_ok=True)


def _read_journal(path: Path) -> tuple[list[PartRecord], list[str], int]:
    """The records of a journal, the checksums after the last one, and the length of its whole lines in bytes."""
    records: list[PartRecord] = []
    sums: list[str] = []
    length = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            value: dict[str, Any] = json.loads(line)
            record = PartRecord.from_json(value)
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n") or (records and record.number <= records[-1].number):
            break
        records.append(record)
        sums, length = list(value["sums"]), length + len(line)
    return records, sums, length
