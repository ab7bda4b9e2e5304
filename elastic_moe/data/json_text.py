"""Texts in JSON: one value a line, or the values of one array.

A value is a text, or an object with a text in a field. `.jsonl` and `.ndjson` files have one a line. `.json` files may
have anything: they are told apart by what they begin with. C4 and Dolma give that name to files of lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from elastic_moe.data.source_file import ARRAY, LINES, TEXT
from elastic_moe.errors import UserError

TEXT_FIELDS = ("text", "content")
MOST_BEGIN = 1 << 25  # characters of a file's first value by which its kind is told
MOST_VALUE = 1 << 28  # characters of a value of an array
_CHUNK = 1 << 16
_SPACE = re.compile(r"\s*")
_NO_JSON = object()


def kind_of(stream: TextIO, text_field: str) -> str:
    """Whether a `.json` file is lines or an array of values with a text, or else a text itself."""
    begin = stream.read(_CHUNK).lstrip()
    if begin.startswith("["):
        first = next(_values(begin[1:], stream, MOST_BEGIN), None)
        return ARRAY if isinstance(first, dict) and text_of(first, text_field) is not None else TEXT
    if not begin.startswith("{"):
        return TEXT
    while "\n" not in begin and len(begin) < MOST_BEGIN and (more := stream.read(len(begin))):
        begin += more
    first, _, second = begin.partition("\n")
    lines = text_of(_parsed(first), text_field) is not None and second.lstrip()[:1] in ("", "{")
    return LINES if lines else TEXT


def array_texts(stream: TextIO, path: str, text_field: str) -> Iterator[str]:
    """The texts of an array, each read when it is asked for.

    Raises:
        UserError: a value has no text, or the array does not end.
    """
    while (begin := stream.read(1)).isspace():
        pass
    assert begin == "[", f"{path} was told to be an array"
    for number, value in enumerate(_values("", stream), 1):
        if value is _NO_JSON:
            raise UserError(
                f"data.corpus: {path}, value {number} is no JSON, or the array does not end where the file does."
            )
        yield _needed(value, f"{path}, value {number}", text_field)


def _values(held: str, stream: TextIO, most: int = MOST_VALUE) -> Iterator[Any]:
    """The values of an array after its bracket; `_NO_JSON` for what is none, as the last one.

    Args:
        held: what was read of it.
        stream: the rest.
        most: characters of a value that are read.
    """
    decoder, at, first = json.JSONDecoder(), 0, True
    while True:
        at = _after_space(held, at)
        if at == len(held):
            held, at = stream.read(_CHUNK), 0
            if held:
                continue
        if held[at : at + 1] == "]":
            if held[at + 1 :].strip() or any(more.strip() for more in iter(lambda: stream.read(_CHUNK), "")):
                yield _NO_JSON
            return
        if held[at : at + 1] in (("{", '"') if first else (",",)):
            try:
                value, end = decoder.raw_decode(held, _after_space(held, at if first else at + 1))
                yield value
                at, first = end, False
                continue
            except (ValueError, RecursionError):  # as much again: no value is read more than about twice
                held, at = held[at:], 0
                if len(held) <= most and (more := stream.read(max(len(held), _CHUNK))):
                    held += more
                    continue
        yield _NO_JSON
        return


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def line_text(line: str, where: str, text_field: str) -> str:
    """The text of a line.

    Raises:
        UserError: it has none.
    """
    value = _parsed(line)
    if value is _NO_JSON:
        raise UserError(f"data.corpus: {where} is no JSON.")
    return _needed(value, where, text_field)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NO_JSON


def text_of(value: Any, text_field: str) -> str | None:
    """The text of a value, "" where it is null, as in a table; None if the value has none."""
    if isinstance(value, dict):
        fields = (text_field,) if text_field else TEXT_FIELDS
        empty = "" if any(name in value and value[name] is None for name in fields) else None
        return next((value[name] for name in fields if isinstance(value.get(name), str)), empty)
    return value if isinstance(value, str) else None


def _needed(value: Any, where: str, text_field: str) -> str:
    text = text_of(value, text_field)
    if text is None:
        fields, hint = (
            (text_field, "") if text_field else (" or ".join(TEXT_FIELDS), "; data.text_field names another field")
        )
        raise UserError(f"data.corpus: {where} has no text under {fields}{hint}.")
    return whole_characters(text)


def whole_characters(text: str) -> str:
    """The text, with U+FFFD for half a character, which JSON may hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
