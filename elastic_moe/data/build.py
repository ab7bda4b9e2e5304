"""Prepares a corpus in a working directory: the tokenizer, duplicates, the parts' tokens, and their assembly."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.assembly import JOURNAL, Assembly, Damaged
from elastic_moe.data.corpus import CorpusFiles, cut_into_parts, limit_of
from elastic_moe.data.dedup import write_keep, write_prints
from elastic_moe.data.encode import EncodeSettings, PartRecord, encode_part, part_path, read_record, shortened
from elastic_moe.data.encoder import ENCODE, PRINTS
from elastic_moe.data.encoder_pool import EncoderPool, usable_cpus
from elastic_moe.data.pieces import ValidationSplit, piece_bytes, read_pieces
from elastic_moe.data.source_file import OF_TOKENS, Part
from elastic_moe.data.tokenizer import (
    TOKENIZER_FILE,
    BpeTokenizer,
    BytesTokenizer,
    IdsTokenizer,
    TextTokenizer,
    load_tokenizer,
    read_tokenizer_file,
)
from elastic_moe.errors import UserError

SAMPLE_BYTES = 100_000_000  # of text that a tokenizer is trained on at most
_SAMPLE_PIECE = 1_000_000  # of it that are read in one place
SAMPLED, DROPPED = "sample.json", "dropped.json"
Told = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class Source:
    """One corpus: its name in a mixture, its settings and its files."""

    name: str
    config: DataConfig
    listed: CorpusFiles


@dataclass(frozen=True, slots=True)
class Built:
    """What was done. `sampled`: bytes of text that the tokenizer was trained on, 0 for all; `dropped`: duplicates."""

    assembly: Assembly
    sampled: int
    dropped: int


class Build:
    """One preparation.

    Args:
        config: the data configuration.
        sources: the corpora.
        directory: the working directory; what an earlier process has finished there is kept.
        told: is told how far the work is, see `prepare.Told`.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source], directory: Path, told: Told) -> None:
        self._config, self._sources, self._directory, self._told = config, sources, directory, told
        self._parts: list[Part] = []
        self._sampled = 0  # bytes of text that the tokenizer is trained on
        for index, source in enumerate(sources):
            first = Part(len(self._parts), (), corpus=index, limit=limit_of(source.config))
            self._parts += cut_into_parts(source.listed.files, first)
        self._total = sum(part.weight for part in self._parts)
        if len(sources) == 1 and self._parts[0].limit:
            self._total = min(self._total, self._parts[0].limit)
        size = piece_bytes(self._total, config.val_fraction)
        self._settings = EncodeSettings(str(directory), size, config.val_fraction, config.text_field, config.dedup)

    def run(self) -> Built:
        """Do what is left to do.

        Raises:
            UserError: a file cannot be read, or has no text where it should.
            OSError: the directory cannot be written.
        """
        for path in self._directory.glob(".part-*"):  # of a process that was killed
            path.unlink(missing_ok=True)
        tokenizer, sampled = self._tokenizer()
        if len(self._parts) == 1:
            return Built(self._one(tokenizer), sampled, _number(self._directory, DROPPED) or 0)
        processes = self._config.processes or usable_cpus()
        with EncoderPool(self._settings, min(processes, len(self._parts)), self._word) as pool:
            dropped = self._drop(pool)
            return Built(self._many(pool, tokenizer), sampled, dropped)

    # --- the tokenizer ------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> tuple[TextTokenizer, int]:
        """The tokenizer, and the bytes that it was trained on; 0 for all of them, or if it was not."""
        path, known = self._directory / TOKENIZER_FILE, _number(self._directory, SAMPLED)
        if path.is_file() and known is not None:
            return load_tokenizer(path), known
        tokenizer, size = self._new_tokenizer()
        tokenizer.save(path)
        _keep_number(self._directory, SAMPLED, size)
        return tokenizer, size

    def _new_tokenizer(self) -> tuple[TextTokenizer, int]:
        config = self._config
        if config.tokenizer == "bytes":
            return BytesTokenizer(), 0
        if config.tokenizer == "ids":
            return IdsTokenizer(config.vocab_size), 0
        if config.tokenizer != "bpe":
            return read_tokenizer_file(config.tokenizer), 0
        known = all(file.size >= 0 for source in self._sources for file in source.listed.files)
        whole = known and self._total <= SAMPLE_BYTES
        self._told("reading the text", 0, min(self._total, SAMPLE_BYTES))  # at once, not in a thread of the trainer
        tokenizer = BpeTokenizer.train(self._sample(whole), config.vocab_size)
        return tokenizer, 0 if whole else self._sampled

    def _sample(self, whole: bool) -> Iterator[str]:
        """Text for training that the tokenizer is made from: all of it, or as much from every so many parts."""
        total, self._sampled = min(self._total, SAMPLE_BYTES), 0
        parts = self._parts if whole else self._parts[:: max(1, len(self._parts) * _SAMPLE_PIECE // SAMPLE_BYTES)]
        read = [0] * len(self._sources)
        for part in parts:
            limit = part.limit - read[part.corpus] if whole else SAMPLE_BYTES // len(parts)
            if part.limit and limit <= 0:
                continue
            split = ValidationSplit(self._config.val_fraction, part.offset, self._settings.piece_bytes)
            for piece in read_pieces(part.files, max(limit, 0), self._settings.piece_bytes, self._config.text_field):
                if not split.is_val(piece):
                    yield piece.text
                read[part.corpus] += piece.size
                self._sampled += len(piece.text.encode())
                self._told("reading the text", min(self._sampled, total), total)
        self._told("training the tokenizer", 0, 0)

    # --- duplicates ---------------------------------------------------------------------------------------------------

    def _drop(self, pool: EncoderPool) -> int:
        """Find duplicates. Returns the number of documents that are left out."""
        if self._config.dedup == "off":
            return 0
        if (known := _number(self._directory, DROPPED)) is not None:
            return known
        missing = [part for part in self._parts if not part_path(self._directory, part.number, "prints").is_file()]
        before = sum(part.weight for part in self._parts) - sum(part.weight for part in missing)
        for _ in pool.records(PRINTS, missing, lambda done: self._tell("looking for duplicates", before + done)):
            pass
        return self._decide()

    def _decide(self) -> int:
        dropped = write_keep(self._directory, [part.number for part in self._parts])
        _keep_number(self._directory, DROPPED, dropped)
        return dropped

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _one(self, tokenizer: TextTokenizer) -> Assembly:
        """The only part, in this process, with the threads of the tokenizer."""
        (part,) = self._parts
        if self._config.dedup != "off" and _number(self._directory, DROPPED) is None:
            write_prints(part, self._settings, lambda done: self._tell("looking for duplicates", done))
            self._decide()
        with self._assembly(tokenizer) as assembly:
            if not assembly.records:
                self._tell("encoding", 0)
                record = encode_part(part, self._settings, tokenizer, lambda done: self._tell("encoding", done))
                assembly.append(record)
        return assembly

    def _many(self, pool: EncoderPool, tokenizer: TextTokenizer) -> Assembly:
        """All parts, in the processes of the pool. Those that are encoded already are taken as they are."""
        with self._assembly(tokenizer) as assembly:
            last = assembly.records[-1].number if assembly.records else -1
            left = [part for part in self._parts if part.number > last and not self._is_full(assembly, part)]
            known = {part.number: record for part in left if (record := read_record(self._directory, part)) is not None}
            missing = [part for part in left if part.number not in known]
            done = max(self._total - sum(part.weight for part in missing), 0)  # data.max_bytes ends before all of them
            self._tell("encoding", done)
            answers = pool.records(ENCODE, missing, lambda more: self._tell("encoding", done + more))
            with closing(answers):
                for part in left:
                    if len(self._sources) == 1 and self._is_full(assembly, part):
                        break
                    record = known.get(part.number) or PartRecord.from_json(next(answers))
                    if self._is_full(assembly, part):
                        continue
                    try:
                        self._append(assembly, part, record)
                    except Damaged:  # of a part that was encoded before a crash of the machine
                        again = pool.records(ENCODE, [part], lambda _: None)
                        self._append(assembly, part, PartRecord.from_json(next(again)))
        return assembly

    def _left(self, assembly: Assembly, part: Part) -> int:
        """Characters of a part's corpus that may still be read."""
        return part.limit - assembly.characters(part.corpus)

    def _is_full(self, assembly: Assembly, part: Part) -> bool:
        """Whether as much of a part's corpus was read as `data.max_bytes` allows."""
        return bool(part.limit) and self._left(assembly, part) <= 0

    def _append(self, assembly: Assembly, part: Part, record: PartRecord) -> None:
        """Append a part, or as much of it as `data.max_bytes` allows."""
        cut = bool(part.limit) and record.stats.characters > (left := self._left(assembly, part))
        assembly.append(record, shortened(record, self._directory, left) if cut else None)

    @contextmanager
    def _assembly(self, tokenizer: TextTokenizer) -> Generator[Assembly]:
        """What was put together before, if it is undamaged. After an error its files are closed."""
        try:
            assembly = Assembly(self._directory, tokenizer.vocab_size)
        except Damaged:
            (self._directory / JOURNAL).unlink(missing_ok=True)
            assembly = Assembly(self._directory, tokenizer.vocab_size)
        try:
            yield assembly
        except BaseException:
            assembly.close()
            raise

    def _word(self, text: str) -> None:
        self._told(text, 0, 0)

    def _tell(self, what: str, done: int) -> None:
        self._told(what, min(done, self._total), self._total)


def check_dedup(config: DataConfig, sources: Sequence[Source]) -> None:
    """Duplicates among tokens are not looked for.

    Raises:
        UserError: they should be.
    """
    for source in sources:
        if config.dedup != "off" and any(file.kind in OF_TOKENS for file in source.listed.files):
            raise UserError(f"data.dedup={config.dedup} compares text, and {source.config.corpus} holds tokens.")


def _number(directory: Path, name: str) -> int | None:
    """A number that is kept in a working directory; None if it is not there."""
    try:
        return int((directory / name).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _keep_number(directory: Path, name: str, number: int) -> None:
    """Keep a number, or nothing if this process is killed meanwhile."""
    written = directory / f"{name}.new"
    written.write_text(str(number))
    os.replace(written, directory / name)
