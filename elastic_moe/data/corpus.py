"""The text of a corpus, as files and as pieces. `prepare.py` makes tokens from it.

The default corpus, "stdlib", is the source of the Python standard library, with its docstrings and the language
reference that `help()` shows. Every machine that can run this program has these megabytes, without a download, under
the PSF licence. A piece is a whole document, or consecutive whole lines of a long one. Each piece belongs either to
training or to validation.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.config.schema import DataConfig
from elastic_moe.errors import UserError

STDLIB = "stdlib"
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


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of one document. `ends` is true if the document ends here."""

    text: str
    ends: bool


def list_files(config: DataConfig) -> list[SourceFile]:
    """List the files of the corpus in a fixed order, until they have `max_bytes` bytes.

    Raises:
        UserError: the corpus does not exist or has no text.
    """
    if config.corpus == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in root.rglob("*.py") if not EXCLUDED_DIRS.intersection(p.relative_to(root).parts[:-1])]
    else:
        root = Path(config.corpus).expanduser()
        if root.is_file():
            found, root = [root], root.parent
        elif root.is_dir():
            found = [path for path in root.rglob(config.pattern) if path.is_file()]
            if not found:
                raise UserError(f"data.pattern={config.pattern} matches no file in the directory data.corpus={root}")
        else:
            raise UserError(f'data.corpus={config.corpus} does not exist; give a text file, a directory, or "{STDLIB}"')
    files: list[SourceFile] = []
    total = 0
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        if config.max_bytes and total >= config.max_bytes:
            break
        stat = path.stat()
        if stat.st_size and not _is_binary(path):
            files.append(SourceFile(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
            total += stat.st_size
    if not files:
        raise UserError(f"data.corpus={config.corpus} has no text; give a text file, or a directory with text files")
    return files


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return b"\0" in stream.read(4096)
    except OSError as error:
        raise UserError(f"data.corpus: cannot read {path}: {error.strerror}") from error


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
        with file.path.open(encoding="utf-8", errors="replace", newline="") as stream:
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
                    yield Piece(held, ends=False)
                held = text
            if held is not None:
                yield Piece(held, ends=True)
        if left == 0:
            return


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
