"""Files as text: which encoding, compressed or not, plain text or one JSON value a line.

UTF-8, with or without a mark, UTF-16 and UTF-32 with a mark, Latin-1 and Windows-1252 are told apart by the first bytes
of a file. `.gz`, `.bz2`, `.xz` and `.zst` files are read decompressed. A `.jsonl` file has a document on each line: a
text, or an object with a text in a field (`json_text.py`). A part of a file has the lines that begin in it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, TextIO, cast

from elastic_moe.data import json_text
from elastic_moe.data.location import has_ranges, open_binary, why_unreadable
from elastic_moe.data.source_file import ARRAY, LINES, SourceFile
from elastic_moe.errors import UserError

HEAD_BYTES = 1 << 16  # by which a file's format is told
SEARCH_BYTES = 4 << 20  # a place to cut a file is the end of a line that is no longer than this
BLOCK_BYTES = 1 << 20  # a block of bzip2 has no more; its checksum is compared at its end
JSONL, JSON = (".jsonl", ".ndjson"), ".json"
CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # bytes that no text in an encoding of bytes has
_MARKS = (  # the longer marks first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decompressed(raw: BinaryIO, codec: str) -> BinaryIO:
    """The content of an open file, decompressed by `codec`; "": as it is."""
    match codec:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "bz2":
            return cast(BinaryIO, io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), HEAD_BYTES))
        case "xz":
            return cast(BinaryIO, io.BufferedReader(_Streams(raw, lzma.LZMADecompressor), HEAD_BYTES))
        case "zstd":
            import pyarrow as pa

            return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), HEAD_BYTES))
        case _:
            return raw


class _Streams(io.RawIOBase):
    """The content of bzip2 or xz streams, one after the other.

    Python's own readers take a damaged stream behind another for the end of the file, and lose the rest in silence.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._new, self._one = raw, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            fed = b""
            if self._one.eof:
                # Between two streams of xz there may be zeros.
                fed = self._one.unused_data.lstrip(b"\0")
                while not fed and (fed := self._raw.read(HEAD_BYTES)):
                    fed = fed.lstrip(b"\0")
                if not fed:
                    return 0
                self._one = self._new()
            elif self._one.needs_input and not (fed := self._raw.read(HEAD_BYTES)):
                raise EOFError("it ends in the middle of a compressed stream")
            data = self._one.decompress(fed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def head_of(path: str, codec: str) -> bytes:
    """The first bytes of a file, decompressed.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with closing(open_binary(path)) as raw, closing(decompressed(raw, codec)) as stream:
            head = stream.read(HEAD_BYTES)
            if codec and encoding_of(head) is None:  # is it no text, or is it damaged?
                stream.read(BLOCK_BYTES)
            return head
    except UNREADABLE as error:
        raise unreadable(path, error) from error


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
    if _CONTROLS.search(head):  # of a small binary file
        return None
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in head) else "latin-1"


def kind_of_json(path: str, codec: str, encoding: str, text_field: str) -> str:
    """How a `.json` file is read: `json_text.kind_of`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with (
            closing(open_binary(path)) as raw,
            closing(decompressed(raw, codec)) as binary,
            io.TextIOWrapper(binary, encoding=encoding, errors="replace", newline="") as stream,
        ):
            return json_text.kind_of(stream, text_field)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> UserError:
    """The sentence about a file that cannot be read."""
    return UserError(f"data.corpus: cannot read {path}: {why_unreadable(error)}")


def can_be_cut(file: SourceFile) -> bool:
    """Whether a file of text may be read in parts: a byte of value 10 is the end of a line there.

    Raises:
        UserError: it cannot be read.
    """
    by_lines = not file.codec and file.kind != ARRAY and not file.encoding.startswith(("utf-16", "utf-32"))
    try:
        return by_lines and has_ranges(file.path)
    except OSError as error:
        raise unreadable(file.path, error) from error


def documents(file: SourceFile, text_field: str = "") -> Iterator[tuple[TextIO, bool]]:
    """The documents of a file of text or lines as streams, each to be read before the next is asked for.

    Yields:
        (stream, whether the document ends with it; it does not in a part of a text that goes on).

    Raises:
        UserError: a line has no text.
        OSError, EOFError, zlib.error, LZMAError: the file cannot be read.
    """
    with closing(open_binary(file.path)) as raw, closing(decompressed(raw, file.codec)) as binary:
        encoding, content, ends = file.encoding, binary, True
        if file.count:
            first, last = line_range(binary, file)
            if first == last:
                return
            binary.seek(first)
            ends = last == file.size
            content = cast(BinaryIO, io.BufferedReader(_Limited(binary, last - first), HEAD_BYTES))
            if first and encoding == "utf-8-sig":
                encoding = "utf-8"
        with io.TextIOWrapper(content, encoding=encoding, errors="replace", newline="") as stream:
            if file.kind == ARRAY:
                for text in json_text.array_texts(stream, file.path, text_field):
                    yield io.StringIO(text, newline=""), True
                return
            if file.kind != LINES:
                yield stream, ends
                return
            where = f" after byte {file.begin}" if file.begin else ""
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield (
                        io.StringIO(json_text.line_text(line, f"{file.path}:{number}{where}", text_field), newline=""),
                        True,
                    )


def line_range(stream: BinaryIO, part: SourceFile) -> tuple[int, int]:
    """Begin and end, in bytes, of the lines that belong to a part of a file.

    Parts begin at multiples of `count`. A cut moves to the next line, and is left out where no line begins soon, so
    that a file that is one long line is one part, and the others are empty.
    """
    search = min(SEARCH_BYTES, part.count)

    def cut(at: int) -> int | None:
        return part.size if at >= part.size else _line_begin(stream, at, search)

    first = cut(part.begin)
    if first is None:
        return 0, 0
    at = part.begin + part.count
    while (last := cut(at)) is None:
        at += part.count
    return first, last


def _line_begin(stream: BinaryIO, at: int, search: int) -> int | None:
    """The first begin of a line at a byte or after it, within so many bytes."""
    if at == 0:
        return 0
    stream.seek(at - 1)
    begin = at - 1
    while begin < at - 1 + search:
        chunk = stream.read(min(HEAD_BYTES, at - 1 + search - begin))
        found = chunk.find(b"\n")
        if found >= 0:
            return begin + found + 1
        if not chunk:
            return None
        begin += len(chunk)
    return None


class _Limited(io.RawIOBase):
    """The next so many bytes of an open file, which stays open."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self._stream, self._left = stream, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)
