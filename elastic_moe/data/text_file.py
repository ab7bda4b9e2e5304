"""Files as text: which encoding, compressed or not, plain text or one JSON object a line.

UTF-8, with or without a mark, UTF-16 and UTF-32 with a mark, Latin-1 and Windows-1252 are told apart by the first bytes
of a file. `.gz` files are read decompressed. A `.jsonl` file has a document on each line: a text, or an object whose
`text` or `content` is one.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from elastic_moe.errors import UserError

HEAD_BYTES = 1 << 16  # by which a file's format is told
JSONL = (".jsonl", ".ndjson")
TEXT_FIELDS = ("text", "content")
_MARKS = (  # the longer marks first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Attributes: encoding, by Python's name; compressed, by gzip; lines, with a JSON value on each."""

    encoding: str
    compressed: bool
    lines: bool


PLAIN = TextFormat("utf-8", compressed=False, lines=False)


def format_of(path: Path) -> TextFormat | None:
    """The format of a file, by its name and its first bytes; None if it is no text.

    Raises:
        UserError: it cannot be read.
    """
    compressed = path.suffix == ".gz"
    lines = (path.with_suffix("") if compressed else path).suffix in JSONL
    try:
        with gzip.open(path) if compressed else path.open("rb") as stream:
            encoding = encoding_of(cast(bytes, stream.read(HEAD_BYTES)))
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error
    return encoding and TextFormat(encoding, compressed, lines)  # type: ignore[return-value]


def encoding_of(head: bytes) -> str | None:
    """The encoding of a text that begins so; None if it is no text.

    Text without a mark is UTF-8 unless most of its bytes beyond ASCII are invalid there.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        return None
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    invalid = text.count("\ufffd")
    if 2 * invalid <= sum(character > "\x7f" for character in text):
        return "utf-8"
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in head) else "latin-1"


def unreadable(path: Path, error: Exception) -> UserError:
    """The sentence about a file that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"data.corpus: cannot read {path}: {reason}")


def documents(path: Path, form: TextFormat) -> Iterator[TextIO]:
    """The documents of a file as streams of text, each to be read before the next is asked for.

    Raises:
        UserError: a line has no text.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    opened = gzip.open if form.compressed else open
    with cast(Any, opened)(path, "rt", encoding=form.encoding, errors="replace", newline="") as stream:
        if not form.lines:
            yield stream
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield io.StringIO(_text_in(line, f"{path}:{number}"), newline="")


def _text_in(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.corpus: {where} is no JSON.") from error
    if isinstance(value, dict):
        value = next((value[name] for name in TEXT_FIELDS if isinstance(value.get(name), str)), None)
    if not isinstance(value, str):
        raise UserError(f"data.corpus: {where} has no text under {' or '.join(TEXT_FIELDS)}.")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold half a character
