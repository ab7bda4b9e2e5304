"""The text of a corpus, as files and as pieces. `prepare.py` makes tokens from it.

The default corpus, "stdlib", is the source of the Python standard library, with its docstrings and the language
reference that `help()` shows. Every machine that can run this program has these megabytes, without a download, under
the PSF licence. A piece is a whole document, or consecutive whole lines of a long one. Each piece belongs either to
training or to validation.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.text_file import PLAIN, TextFormat, documents, format_of, unreadable
from elastic_moe.errors import UserError

STDLIB = "stdlib"
HIDDEN = "hidden or an editor's"
EXCLUDED_DIRS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload", "__phello__"}
    | {"encodings"}  # tables of character names, a tenth of the text
)
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 512, 65536


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus. `name` is its path relative to the corpus; size and time identify its content."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    form: TextFormat = PLAIN


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of one document. `ends` is true if the document ends here."""

    text: str
    ends: bool


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


def list_files(config: DataConfig) -> CorpusFiles:
    """List the files of the corpus in a fixed order, until they have `max_bytes` bytes.

    Raises:
        UserError: the corpus does not exist or has no text.
    """
    found, root, hidden = _found(config)
    listed = CorpusFiles(skipped=Counter({HIDDEN: hidden} if hidden else {}))
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        try:
            stat = path.stat()
        except OSError:
            listed.skipped["broken link"] += 1
            continue
        if not stat.st_size:
            listed.skipped["empty"] += 1
        elif config.max_bytes and listed.total_bytes >= config.max_bytes:
            listed.skipped["beyond data.max_bytes"] += 1
            listed.total_bytes += stat.st_size
        elif (form := format_of(path)) is None:
            listed.skipped["not text"] += 1
        else:
            name = path.relative_to(root).as_posix()
            listed.files.append(SourceFile(path, name, stat.st_size, stat.st_mtime_ns, form))
            listed.total_bytes += stat.st_size
    if not listed.files:
        raise UserError(f"data.corpus={config.corpus} has no text; give a text file, or a directory with text files")
    return listed


def _found(config: DataConfig) -> tuple[list[Path], Path, int]:
    """Paths of the corpus, the directory that they are relative to, and the number of files left out by their names."""
    if config.corpus == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for directory, below, files in os.walk(root):
            below[:] = [name for name in below if name not in EXCLUDED_DIRS]
            found += [Path(directory, name) for name in files if name.endswith(".py")]
        return found, root, 0
    root = Path(config.corpus).expanduser()
    if not config.corpus.strip() or not root.exists():
        raise UserError(f'data.corpus={config.corpus!r} does not exist; give a text file, a directory, or "{STDLIB}"')
    if not root.is_dir():
        return [root], root.parent, 0
    pattern = config.pattern.removeprefix("**/")
    found = [path for path in _walk(root) if path.relative_to(root).match(pattern)]
    kept = [path for path in found if not any(_is_hidden(part) for part in path.relative_to(root).parts)]
    if not kept:
        raise UserError(f"data.pattern={config.pattern} matches no file in the directory data.corpus={root}")
    return kept, root, len(found) - len(kept)


def _walk(root: Path) -> Iterator[Path]:
    """All files below a directory, through links too; each directory once, whatever links lead to it."""
    seen: set[str] = set()
    for directory, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        below[:] = [name for name in below if name != ".git"]
        yield from (Path(directory, name) for name in files)


def _is_hidden(name: str) -> bool:
    """Whether a file or directory is hidden, or an editor's own: `.git`, `.x.swp`, `x~`, `#x#`."""
    return name.startswith(".") or name.endswith("~") or (name.startswith("#") and name.endswith("#"))


def piece_bytes(total_bytes: int, val_fraction: float) -> int:
    """Characters per piece: few enough that the validation text is several pieces from all parts of the corpus."""
    return int(min(max(total_bytes * val_fraction / 8, MIN_PIECE_BYTES), MAX_PIECE_BYTES))


def read_pieces(files: list[SourceFile], max_bytes: int, size: int) -> Iterator[Piece]:
    """Read the corpus, piece by piece, with only one piece in memory at a time.

    Args:
        files: the files, in order.
        max_bytes: stop after about this many characters; 0 for no limit.
        size: characters after which a piece ends, at the end of the line.
    """
    left = max_bytes or -1
    for file in files:
        for text, ends in _chunks(file, size, left):
            if left > 0:
                left = max(left - len(text), 0)
            yield Piece(text, ends)
        if left == 0:
            return


def _chunks(file: SourceFile, size: int, left: int) -> Iterator[tuple[str, bool]]:
    """Text of a file in chunks of about `size` characters, at most about `left` of them (below 0: no limit).

    Raises:
        UserError: the file cannot be read.
    """
    try:
        for stream in documents(file.path, file.form):
            held: str | None = None
            while left != 0:
                wanted = size if left < 0 else min(size, left)
                text = stream.read(wanted)
                if not text:
                    break
                if wanted == size and not text.endswith("\n"):
                    text += stream.readline(MAX_PIECE_BYTES)
                if left > 0:
                    left = max(left - len(text), 0)
                if held is not None:
                    yield held, False
                held = text
            if held is not None:
                yield held, True
            if left == 0:
                return
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.path, error) from error


class ValidationSplit:
    """Chooses pieces for validation, such that their share of the text is close to a fraction at every point."""

    def __init__(self, val_fraction: float) -> None:
        self._fraction, self._val, self._total = val_fraction, 0, 0

    def is_val(self, piece: Piece) -> bool:
        """Whether the next piece is for validation."""
        size = len(piece.text)
        # Half a piece early: the first validation piece then lies in the middle of its share of the corpus.
        val = self._val + size / 2 <= self._fraction * (self._total + size) and self._total > 0
        self._total += size
        self._val += size if val else 0
        return val
