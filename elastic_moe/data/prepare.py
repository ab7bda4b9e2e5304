"""Makes token shards from a corpus, in a cache directory whose name is a hash of everything that the tokens depend on.

A complete, undamaged result is used as it is. A new one is written to a directory with a temporary name, which is
renamed when it is complete. So two runs may prepare the same corpus at once, and a preparation that is killed leaves no
directory that looks complete. No environment variable is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.corpus import (
    CorpusFiles,
    Piece,
    SourceFile,
    ValidationSplit,
    list_files,
    piece_bytes,
    read_pieces,
)
from elastic_moe.data.shards import FORMAT, TokenShard, TokenShardWriter, file_sha256, token_digest
from elastic_moe.data.tokenizer import (
    TOKENIZER_FILE,
    BpeTokenizer,
    BytesTokenizer,
    TextTokenizer,
    load_tokenizer,
    read_tokenizer_file,
)
from elastic_moe.errors import UserError

TRAIN, VAL = "train.bin", "val.bin"
SUMMARY = "corpus.txt"  # one line about what was read
READER = 2  # version of how files become text and tokens; part of the cache's names
_BATCH = 64  # pieces encoded at once
Told = Callable[
    [str, int, int], object
]  # is told a part of the work, and how many of how many bytes are done; 0 of 0: unknown


def _silent(_part: str, _done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Paths of a prepared corpus; can be sent between processes.

    Attributes:
        train_path, val_path, tokenizer_path: files of one directory.
        vocab_size: tokens that the tokenizer knows.
        digest: of tokens and tokenizer, by which another machine knows whether it has the same corpus there.
    """

    train_path: str
    val_path: str
    tokenizer_path: str
    vocab_size: int
    digest: str = ""

    @property
    def summary(self) -> str:
        """One line about what was read and what was left out; "" where it is not known."""
        path = Path(self.train_path).with_name(SUMMARY)
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    @property
    def train(self) -> TokenShard:
        return TokenShard.open(self.train_path)

    @property
    def val(self) -> TokenShard:
        return TokenShard.open(self.val_path)


def default_cache_root(config: DataConfig, run_dir: str | Path) -> Path:
    """Directory of all prepared corpora: `data.cache_dir`, or `.cache` beside the run directories."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else Path(run_dir).absolute().parent / ".cache"


def prepare(config: DataConfig, cache_root: str | Path, told: Told = _silent) -> Prepared:
    """Find the token shards and the tokenizer of a corpus in the cache, or make them.

    Args:
        config: the data configuration.
        cache_root: directory of all prepared corpora.
        told: is told again and again how far the work is; not where the result is in the cache.

    Raises:
        UserError: the corpus is missing, has no text, or is too small for a sample of `seq_len` tokens.
    """
    if not 0 < config.val_fraction < 1:
        raise UserError(f"data.val_fraction={config.val_fraction} must lie between 0 and 1")
    if config.tokenizer not in ("bpe", "bytes") and not Path(config.tokenizer).expanduser().is_file():
        raise UserError(f'data.tokenizer={config.tokenizer} is neither "bpe" nor "bytes" nor a file')
    listed = list_files(config)
    files, root = listed.files, Path(cache_root).absolute()
    kind = config.tokenizer if config.tokenizer in ("bpe", "bytes") else "file"
    final = root / f"{kind}-{_key(config, files)}"
    prepared = find_prepared(final)
    if prepared is None:
        prepared = _build(config, listed, final, told)
    for path, key in ((prepared.train_path, "data.corpus"), (prepared.val_path, "data.val_fraction")):
        shard = TokenShard.open(path, verify=False)
        if shard.num_samples(config.seq_len) == 0:
            raise UserError(
                f"{key}: {Path(path).stem} text has {len(shard)} tokens, too few for data.seq_len={config.seq_len}; "
                f"use more text or a smaller data.seq_len"
            )
    return prepared


def _key(config: DataConfig, files: list[SourceFile]) -> str:
    """Short hash of everything that the tokens depend on; the sequence length is not part of it."""
    vocab_size = config.vocab_size if config.tokenizer == "bpe" else 0
    parts = [FORMAT, READER, config.tokenizer, vocab_size, config.max_bytes, config.val_fraction]
    if config.tokenizer not in ("bpe", "bytes"):
        parts.append(hashlib.sha256(Path(config.tokenizer).expanduser().read_bytes()).hexdigest())
    parts += [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find_prepared(directory: Path) -> Prepared | None:
    """The complete, undamaged result in this directory, if there is one."""
    if not directory.is_dir():
        return None
    try:
        tokenizer = load_tokenizer(directory / TOKENIZER_FILE)
        shards = [TokenShard.open(directory / name) for name in (TRAIN, VAL)]
        if any(shard.vocab_size != tokenizer.vocab_size for shard in shards):
            return None
    except UserError:
        return None
    return prepared_in(directory, tokenizer.vocab_size)


def prepared_in(directory: Path, vocab_size: int) -> Prepared:
    """The paths of the result in this directory, which is taken for complete.

    Raises:
        OSError, ValueError, KeyError: there is none.
    """
    paths = Prepared(str(directory / TRAIN), str(directory / VAL), str(directory / TOKENIZER_FILE), vocab_size)
    return replace(paths, digest=digest_of(paths))


def digest_of(prepared: Prepared) -> str:
    """Digest of the tokens and the tokenizer at the paths of a prepared corpus; the checksums of its indexes count.

    Raises:
        OSError, ValueError, KeyError: there is no such corpus.
    """
    tokens, tokenizer = token_digest(prepared.train_path, prepared.val_path), file_sha256(Path(prepared.tokenizer_path))
    return hashlib.sha256(f"{tokens} {tokenizer}".encode()).hexdigest()


def _build(config: DataConfig, listed: CorpusFiles, final: Path, told: Told) -> Prepared:
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        tokenizer = _tokenizer(config, listed.files, told)
        tokenizer.save(temporary / TOKENIZER_FILE)
        text = _write_tokens(config, listed.files, tokenizer, temporary, told)
        (temporary / SUMMARY).write_text(_summary(listed, text) + "\n", encoding="utf-8")
        _publish(temporary, final)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot prepare the corpus in {final.parent}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prepared = find_prepared(final)
    assert prepared is not None, f"prepared corpus {final} does not verify"
    return prepared


def _split(config: DataConfig, files: list[SourceFile], part: str, told: Told) -> Iterator[tuple[Piece, bool]]:
    """Pieces of the corpus, each with a flag: true for validation. They are told as those of this part of the work."""
    total = sum(file.size for file in files)
    total = min(total, config.max_bytes) if config.max_bytes else total
    told(part, 0, total)  # at once, and not in a thread of whoever reads the pieces
    return _pieces(config, files, total, lambda done: told(part, done, total))


def _pieces(
    config: DataConfig, files: list[SourceFile], total: int, told: Callable[[int], object]
) -> Iterator[tuple[Piece, bool]]:
    split, done = ValidationSplit(config.val_fraction), 0
    for piece in read_pieces(files, config.max_bytes, piece_bytes(total, config.val_fraction)):
        yield piece, split.is_val(piece)
        done += len(piece.text.encode())
        told(min(done, total))


def _tokenizer(config: DataConfig, files: list[SourceFile], told: Told) -> TextTokenizer:
    if config.tokenizer == "bytes":
        return BytesTokenizer()
    if config.tokenizer != "bpe":
        return read_tokenizer_file(config.tokenizer)

    pieces = _split(config, files, "reading the text", told)

    def texts() -> Iterator[str]:
        for piece, is_val in pieces:
            if not is_val:
                yield piece.text
        told("training the tokenizer", 0, 0)

    return BpeTokenizer.train(texts(), config.vocab_size)


@dataclass
class _Text:
    """What was read. Attributes: characters, size in UTF-8, and characters U+FFFD (bytes that could not be decoded)."""

    characters: int = 0
    size: int = 0
    unknown: int = 0

    def add(self, text: str) -> None:
        self.characters += len(text)
        self.size += len(text.encode())
        self.unknown += text.count("\ufffd")


def _summary(listed: CorpusFiles, text: _Text) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in listed.skipped.most_common())
    skipped = f"{listed.skipped.total()} left out ({reasons})" if reasons else "none left out"
    encodings = Counter(file.form.encoding for file in listed.files if not file.form.encoding.startswith("utf-8"))
    others = "".join(f", {number} in {name}" for name, number in encodings.most_common())
    share = f"{text.unknown / max(text.characters, 1):.3%} of it U+FFFD" if text.unknown else "no U+FFFD"
    return (
        f"corpus: {len(listed.files)} files read{others}, {skipped}; {text.size / 1e6:.3g} MB of text from files of "
        f"{listed.total_bytes / 1e6:.3g} MB, {share}"
    )


def _write_tokens(
    config: DataConfig, files: list[SourceFile], tokenizer: TextTokenizer, directory: Path, told: Told
) -> _Text:
    read = _Text()
    train, val = (TokenShardWriter(directory / name, tokenizer.vocab_size) for name in (TRAIN, VAL))
    pieces = _split(config, files, "encoding", told)
    while batch := list(islice(pieces, _BATCH)):
        encoded = tokenizer.encode_batch([piece.text for piece, _ in batch])
        for (piece, is_val), ids in zip(batch, encoded, strict=True):
            read.add(piece.text)
            (val if is_val else train).append([*ids, tokenizer.end_id] if piece.ends else ids)
    train.close()
    val.close()
    return read


def _publish(temporary: Path, final: Path) -> None:
    """Rename the complete directory. It replaces a damaged one; a complete one of another process stays."""
    try:
        os.rename(temporary, final)
    except OSError:
        if find_prepared(final) is not None:
            return
        os.rename(final, final.with_name(f"{temporary.name}-damaged"))
        os.rename(temporary, final)
        shutil.rmtree(final.with_name(f"{temporary.name}-damaged"), ignore_errors=True)
