"""Makes token shards from a corpus, in a cache directory whose name is a hash of everything that the tokens depend on.

A complete, undamaged result is used as it is. A new one is written to a directory with a temporary name, which is
renamed when it is complete. So two runs may prepare the same corpus at once, and a preparation that is killed leaves no
directory that looks complete; the next one goes on with what it has left (`workspace.py`, `assembly.py`). No
environment variable is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.assembly import JOURNAL
from elastic_moe.data.build import Build, Built, Source, check_dedup
from elastic_moe.data.corpus import limit_of, list_files
from elastic_moe.data.encode import TextStats
from elastic_moe.data.shards import FORMAT, TokenShard, file_sha256, token_digest
from elastic_moe.data.source_file import MEGATRON
from elastic_moe.data.tokenizer import KINDS, TOKENIZER_FILE, load_tokenizer, tokenizer_path
from elastic_moe.data.workspace import Workspace
from elastic_moe.errors import UserError

TRAIN, VAL = "train.bin", "val.bin"
SUMMARY = "corpus.txt"  # one line about what was read
READER = 4  # version of how files become text and tokens; part of the cache's names
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
    if config.tokenizer not in KINDS and not tokenizer_path(config.tokenizer).is_file():
        raise UserError(
            f'data.tokenizer={config.tokenizer} is neither "bpe" nor "bytes" nor "ids" nor a tokenizer.json or its '
            "directory"
        )
    sources = _sources(config)
    kind = config.tokenizer if config.tokenizer in KINDS else "file"
    final = Path(cache_root).absolute() / f"{kind}-{_key(config, sources)}"
    prepared = find_prepared(final) or _build(config, sources, final, told)
    _check_sizes(config, prepared)
    return prepared


def _sources(config: DataConfig) -> list[Source]:
    """The corpora, and their files."""
    names = sorted(config.mixture) or [config.corpus]
    settings = [replace(config, corpus=name, mixture={}) for name in names]
    sources = [Source(one.corpus, one, list_files(one)) for one in settings]
    check_dedup(config, sources)
    return sources


def _key(config: DataConfig, sources: Sequence[Source]) -> str:
    """Short hash of everything that the tokens depend on; the sequence length and the weights are not part of it."""
    vocab_size = config.vocab_size if config.tokenizer in ("bpe", "ids") else 0
    parts: list[object] = [FORMAT, READER, config.val_fraction, config.dedup, config.text_field, vocab_size]
    if config.tokenizer in KINDS:
        parts.append(config.tokenizer)
    else:
        path = tokenizer_path(config.tokenizer)
        beside = path.with_name("tokenizer_config.json")  # names the end token
        parts += [file_sha256(one) for one in (path, beside) if one.is_file()]
    for source in sources:
        parts += [source.name if config.mixture else "", limit_of(source.config)]
        parts += [(file.name, file.size, file.mtime_ns) for file in source.listed.files]
        indexes = [Path(file.path).with_suffix(".idx") for file in source.listed.files if file.kind == MEGATRON]
        parts += [(found.st_size, found.st_mtime_ns) for found in map(os.stat, indexes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check_sizes(config: DataConfig, prepared: Prepared) -> None:
    """Refuse a corpus that is too small for one sample."""
    for path, key in ((prepared.train_path, "data.corpus"), (prepared.val_path, "data.val_fraction")):
        shard = TokenShard.open(path, verify=False)
        spans = shard.spans or (("", len(shard)),)
        for (name, tokens), samples in zip(spans, shard.samples(config.seq_len), strict=True):
            if not samples:
                of = f" of {name}" if name else ""
                key = "data.mixture" if name and key == "data.corpus" else key
                few = f"too few for data.seq_len={config.seq_len}"
                raise UserError(
                    f"{key}: {Path(path).stem} text{of} has {tokens} tokens, {few}; use more text or a "
                    "smaller data.seq_len"
                )


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


def _build(config: DataConfig, sources: Sequence[Source], final: Path, told: Told) -> Prepared:
    try:
        with Workspace(final, lambda: told("waiting for another process that prepares it", 0, 0)) as work:
            if (prepared := find_prepared(final)) is not None:
                work.discard()
                return prepared
            try:
                built = Build(config, sources, work.directory, told).run()
                built.assembly.finish([source.name for source in sources] if config.mixture else [])
            except (UserError, OSError):
                if not _has_begun(work.directory):
                    work.discard()
                raise
            (work.directory / SUMMARY).write_text(_summary(sources, built) + "\n", encoding="utf-8")
            work.publish(lambda directory: find_prepared(directory) is not None)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot prepare the corpus in {final.parent}: {error}") from error
    prepared = find_prepared(final)
    assert prepared is not None, f"prepared corpus {final} does not verify"
    return prepared


def _has_begun(directory: Path) -> bool:
    """Whether an unfinished preparation has anything with which a later one could go on."""
    journal = directory / JOURNAL
    return any(directory.glob("part-*.json")) or (journal.is_file() and journal.stat().st_size > 0)


def _summary(sources: Sequence[Source], built: Built) -> str:
    """One line about what was read, what was left out, and what it became."""
    files = [file for source in sources for file in source.listed.files]
    left_out = sum((source.listed.skipped for source in sources), Counter[str]())
    reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
    skipped = f"{left_out.total()} left out ({reasons})" if reasons else "none left out"
    encodings = Counter("ids of 32 bits" if file.encoding == "<u4" else file.encoding for file in files)
    for usual in ("utf-8", "utf-8-sig", "<u2", ""):
        del encodings[usual]
    others = "".join(f", {number} in {name}" for name, number in encodings.most_common())
    total, text = sum(source.listed.total_bytes for source in sources), built.assembly.total
    size = "unknown size" if any(file.size < 0 for file in files) else f"{total / 1e6:.3g} MB"
    share = f"{text.unknown / max(text.characters, 1):.3%} of it U+FFFD" if text.unknown else "no U+FFFD"
    return (
        f"corpus: {len(files)} files read{others}, {skipped}; {text.size / 1e6:.3g} MB of text from files of "
        f"{size}, {share}; {_tokens(text, built)}"
    )


def _tokens(text: TextStats, built: Built) -> str:
    tokens = text.train + text.val
    dropped = f", {built.dropped:,} duplicates left out" if built.dropped else ""
    sampled = f"; the tokenizer is trained on {built.sampled / 1e6:.3g} MB of it" if built.sampled else ""
    return (
        f"{text.documents:,} documents{dropped}, {tokens:,} tokens of {text.size / max(tokens, 1):.2f} bytes, "
        f"{text.val:,} of them for validation{sampled}"
    )
