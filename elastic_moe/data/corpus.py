"""The files of a corpus, and what is read of them. `pieces.py` reads them, `prepare.py` makes tokens.

The default corpus, "stdlib", is the source of the Python standard library, with its docstrings and the language
reference that `help()` shows. Every machine that can run this program has these megabytes, without a download, under
the PSF licence. Any other corpus is used whole, unless `data.max_bytes` says otherwise.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.data import tables, token_file
from elastic_moe.data.location import Listed, check_scheme, list_url, local_file, scheme_of
from elastic_moe.data.source_file import (
    ARROW,
    LINES,
    OF_TOKENS,
    PARQUET,
    TEXT,
    TOKENS,
    TRAIN_ONLY,
    VAL_ONLY,
    Part,
    SourceFile,
)
from elastic_moe.data.text_file import CODECS, JSON, JSONL, can_be_cut, encoding_of, head_of, kind_of_json, unreadable
from elastic_moe.errors import UserError

STDLIB = "stdlib"
STDLIB_BYTES = 8_000_000  # that "stdlib" stands for without data.max_bytes, so that the first run begins soon
HIDDEN = "hidden or an editor's"
EXCLUDED_DIRS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "__phello__"}
    | {"encodings"}  # tables of character names, a tenth of the text
)
PART_BYTES = 4 << 20  # of source that one process encodes at a time
WHOLE_BYTES = 16 << 20  # a corpus of no more is one part, which is encoded by the threads of one process
_VAL = re.compile("(?<![a-z])val(id|idation)?(?![a-z])")  # in the name of a file of tokens
_LOOKS = 16  # files of a server that are looked into at once
_OF_TOKENS = (".bin", ".idx", ".pkl")  # files beside each other where other trainers keep tokens


@dataclass
class CorpusFiles:
    """The files of a corpus.

    Attributes:
        files: those that are read, in order.
        skipped: number of files left out, by reason.
        total_bytes: size of all files with text, the unread ones too.
    """

    files: list[SourceFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    total_bytes: int = 0


def limit_of(config: DataConfig) -> int:
    """Bytes of text that are read; 0 for all."""
    return config.max_bytes or (STDLIB_BYTES if config.corpus == STDLIB else 0)


def list_files(config: DataConfig) -> CorpusFiles:
    """List the files of the corpus in a fixed order, until they have `max_bytes` bytes.

    Raises:
        UserError: the corpus does not exist or has no text.
    """
    check_scheme("data.corpus", config.corpus)
    listed, limit = CorpusFiles(), limit_of(config)
    far = bool(scheme_of(config.corpus))
    entries = _of_url(config, listed.skipped) if far else _of_disk(config, listed.skipped)
    listed.skipped["empty"] += sum(not entry.size for _, entry in entries)
    entries = [one for one in entries if one[1].size and (far or not token_file.is_index(Path(one[1].path)))]
    of_tokens = all(Path(name).suffix in _OF_TOKENS for name, _ in entries)
    look = partial(_look, of_tokens, config.text_field)
    with ThreadPoolExecutor(_LOOKS if far else 1) as pool:
        for begin in range(0, len(entries), _LOOKS):
            some = entries[begin : begin + _LOOKS]
            full = bool(limit) and listed.total_bytes >= limit
            looks = [None] * len(some) if full else pool.map(look, some)
            for (_, entry), file in zip(some, looks, strict=True):
                if limit and listed.total_bytes >= limit:
                    listed.skipped["beyond data.max_bytes"] += 1
                    listed.total_bytes += max(entry.size, 0)
                elif file is None:
                    listed.skipped["not text"] += 1
                else:
                    listed.files.append(file)
                    listed.total_bytes += max(file.size, 0)
    listed.skipped = +listed.skipped
    if not listed.files:
        reasons = "".join(f" ({number} {reason})" for reason, number in listed.skipped.most_common())
        raise UserError(
            f"data.corpus={config.corpus} has no text{reasons}; give a text file, or a directory with text files"
        )
    if any(file.split == VAL_ONLY for file in listed.files):
        listed.files = [replace(file, split=file.split or TRAIN_ONLY) for file in listed.files]
    _check_kinds(config, listed.files)
    return listed


def _look(of_tokens: bool, text_field: str, entry: tuple[str, Listed]) -> SourceFile | None:
    """A file and its format, by its name and its first bytes; None if it is no text.

    Args:
        of_tokens: the corpus has no files but those of `_OF_TOKENS`, so a `.bin` without an index holds tokens.
        text_field: as `data.text_field`.
        entry: name and place of the file.

    Raises:
        UserError: it cannot be read.
    """
    name, found = entry
    file = SourceFile(found.path, name, found.size, found.version)
    path = Path(name.lower())
    codec = CODECS.get(path.suffix, "")
    suffix = path.with_suffix("").suffix if codec else path.suffix
    if suffix in tables.SUFFIXES and not codec:
        return replace(file, kind=tables.SUFFIXES[suffix])
    if suffix == ".bin" and not codec:
        if scheme_of(found.path):
            raise UserError(f"data.corpus: {found.path} holds tokens; copy it to this machine first.")
        if (told := token_file.kind_of(Path(found.path), of_tokens)) is None:
            return None
        split = VAL_ONLY if told[0] == TOKENS and _VAL.search(path.stem) else ""
        return replace(file, kind=told[0], encoding=told[1], split=split)
    if of_tokens or (encoding := encoding_of(head_of(found.path, codec))) is None:
        return None
    kind = LINES if suffix in JSONL else TEXT
    if suffix == JSON:
        kind = kind_of_json(found.path, codec, encoding, text_field)
    return replace(file, kind=kind, encoding=encoding, codec=codec)


def _check_kinds(config: DataConfig, files: list[SourceFile]) -> None:
    """Files of tokens need the tokenizer that made them, and have no place among others."""
    of_tokens = [file for file in files if file.kind in OF_TOKENS]
    if not of_tokens:
        if config.tokenizer == "ids":
            raise UserError(
                f"data.tokenizer=ids is for files of tokens, and {files[0].path} holds text: name a tokenizer, or "
                "choose the files by data.pattern."
            )
        return
    path = of_tokens[0].path
    if len(of_tokens) < len(files):
        other = next(file for file in files if file.kind not in OF_TOKENS)
        raise UserError(
            f"data.corpus={config.corpus} holds tokens ({path}) and text ({other.path}): choose by data.pattern."
        )
    if config.tokenizer in ("bpe", "bytes"):
        raise UserError(
            f"data.corpus: {path} holds tokens, not text: name their tokenizer in data.tokenizer, or give "
            "data.tokenizer=ids and their number in data.vocab_size."
        )


def _of_url(config: DataConfig, skipped: Counter[str]) -> list[tuple[str, Listed]]:
    """Name and place of the files of a URL, sorted by name."""
    found, prefix = list_url(config.corpus)
    names = {one.path.removeprefix(prefix).partition("?")[0]: one for one in found}
    chosen = list(names) if len(names) == 1 else _matching(list(names), config, skipped)
    return [(name, names[name]) for name in sorted(chosen)]


def _of_disk(config: DataConfig, skipped: Counter[str]) -> list[tuple[str, Listed]]:
    """Name and place of the files of this machine, in order."""
    paths, root = _found(config, skipped)
    entries: list[tuple[str, Listed]] = []
    for path in paths:
        try:
            found = local_file(path)
        except OSError as error:
            if not path.is_symlink():  # it has just vanished, or is listed by a saved dataset
                raise unreadable(str(path), error) from error
            skipped["broken link"] += 1
            continue
        if found is None:
            skipped["not a file"] += 1
        else:
            entries.append((path.relative_to(root).as_posix(), found))
    return entries


def _found(config: DataConfig, skipped: Counter[str]) -> tuple[list[Path], Path]:
    """Paths of the corpus in order, and the directory that they are relative to."""
    if config.corpus == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for directory, below, files in os.walk(root):
            below[:] = [name for name in below if name not in EXCLUDED_DIRS]
            found += [Path(directory, name) for name in files if name.endswith(".py")]
        return sorted(found, key=lambda p: p.relative_to(root).as_posix()), root
    root = Path(config.corpus).expanduser()
    if not config.corpus.strip() or not root.exists():
        raise UserError(f'data.corpus={config.corpus!r} does not exist; give a text file, a directory, or "{STDLIB}"')
    if not root.is_dir():
        return [root], root.parent
    saved, beside = tables.saved_files(root)
    if saved:
        if beside:
            skipped["beside the saved dataset"] += len(beside)
        return saved, root
    names = _matching([path.relative_to(root).as_posix() for path in _walk(root)], config, skipped)
    return [root / name for name in sorted(names)], root


def _matching(names: list[str], config: DataConfig, skipped: Counter[str]) -> list[str]:
    """Names that fit `data.pattern` and are not hidden."""
    pattern = config.pattern.removeprefix("**/")
    found = [name for name in names if Path(name).match(pattern)]
    kept = [name for name in found if not any(_is_hidden(part) for part in name.split("/"))]
    if not kept:
        raise UserError(f"data.pattern={config.pattern} matches no file in the directory data.corpus={config.corpus}")
    if len(found) > len(kept):
        skipped[HIDDEN] += len(found) - len(kept)
    return kept


def _walk(root: Path) -> Iterator[Path]:
    """All files below a directory, through links too; each directory once, whatever links lead to it."""
    seen: set[str] = set()
    for directory, below, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(directory)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        below[:] = [name for name in below if name != ".git"]
        yield from (Path(directory, name) for name in files)


def _refuse(error: OSError) -> None:
    """What cannot be listed would be left out in silence."""
    raise unreadable(str(error.filename), error) from error


def _is_hidden(name: str) -> bool:
    """Whether a file or directory is hidden, or an editor's own: `.git`, `.x.swp`, `x~`, `#x#`."""
    return name.startswith(".") or name.endswith("~") or (name.startswith("#") and name.endswith("#"))


def cut_into_parts(files: list[SourceFile], first: Part, part_bytes: int = 0) -> list[Part]:
    """The corpus as parts of about `part_bytes` each, which depend on the files alone.

    Args:
        files: the files, in order.
        first: number, corpus and limit of the first part, which the others follow.
        part_bytes: of source in a part; a corpus without more is one part; 0: `PART_BYTES` and `WHOLE_BYTES`.

    Raises:
        UserError: a file is not what its name says.
    """
    part_bytes, whole_bytes = part_bytes or PART_BYTES, part_bytes or max(PART_BYTES, WHOLE_BYTES)
    total = sum(file.size for file in files)
    if (min(total, first.limit) if first.limit else total) <= whole_bytes:
        return [replace(first, files=tuple(files))]
    parts: list[Part] = []
    held: list[SourceFile] = []
    weight = offset = 0

    def close() -> None:
        parts.append(replace(first, number=first.number + len(parts), files=tuple(held), offset=offset))

    for span in (span for file in files for span in _spans(file, part_bytes)):
        size = span.weight or span.size
        if held and weight + size > part_bytes:
            close()
            offset, held, weight = offset + weight, [], 0
        held.append(span)
        weight += size
    close()
    return parts


def _spans(file: SourceFile, part_bytes: int) -> list[SourceFile]:
    """Parts of a file that is larger than a part; the file itself where it is not, or cannot be cut."""
    if file.kind in (PARQUET, ARROW):
        return tables.parts_of(file, part_bytes)
    if file.size <= part_bytes:
        return [file]
    if file.kind in OF_TOKENS:
        return token_file.parts_of(file, part_bytes)
    if not can_be_cut(file):
        return [file]
    begins = range(0, file.size, part_bytes)
    return [replace(file, begin=at, count=part_bytes, weight=min(part_bytes, file.size - at)) for at in begins]
