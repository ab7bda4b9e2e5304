"""Text in tables: Parquet files, and Arrow files as Hugging Face `datasets` saves them (`save_to_disk`).

A row is a document. Only the column with the text is read, one batch of rows at a time. Parts of a Parquet file are row
groups, parts of an Arrow file record batches. https://parquet.apache.org/docs/file-format/,
https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from elastic_moe.data.json_text import TEXT_FIELDS, whole_characters
from elastic_moe.data.location import open_binary, scheme_of
from elastic_moe.data.source_file import ARROW, PARQUET, SourceFile
from elastic_moe.errors import UserError

SUFFIXES = {".parquet": PARQUET, ".arrow": ARROW}
ROWS = 1024  # of a table that are decoded at once, at most
ROWS_BYTES = 16 << 20  # of text in them, about
BUFFER_BYTES = 1 << 20
DATASET, SPLITS = "state.json", "dataset_dict.json"  # of a saved dataset, and of one with several splits


def rows(file: SourceFile, text_field: str = "") -> Iterator[tuple[TextIO, bool]]:
    """The documents of a table as streams of text, each of them whole; empty values are left out.

    Raises:
        UserError: there is no column of text.
        OSError: the file cannot be read.
    """
    import pyarrow as pa

    columns = _parquet(file, text_field) if file.kind == PARQUET else _arrow(file, text_field)
    try:
        for column in columns:
            for text in _texts(column):
                if text:
                    yield io.StringIO(whole_characters(text), newline=""), True
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _texts(column: Any) -> list[str | None]:
    """The values of a column, with U+FFFD for bytes that are no UTF-8, as in a file of text."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        texts: list[str | None] = column.to_pylist()
        return texts
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in values]


def parts_of(file: SourceFile, wanted_bytes: int) -> list[SourceFile]:
    """A table in parts of about so many bytes each: one part where it cannot be cut.

    Raises:
        UserError: it is no table.
    """
    weights = _weights(file)
    parts: list[SourceFile] = []
    begin = weight = 0
    for index, one in enumerate(weights):
        weight += one
        if weight >= wanted_bytes or index + 1 == len(weights):
            parts.append(replace(file, begin=begin, count=index + 1 - begin, weight=weight))
            begin, weight = index + 1, 0
    return parts or [file]


def saved_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The Arrow files of a directory that `save_to_disk` wrote, in order, and files beside them that hold no text.

    Of a dataset with several splits the training split is taken. Nothing, if the directory is no such one.
    """
    if (splits := _json(directory / SPLITS)) and isinstance(splits.get("splits"), list):
        names = [str(name) for name in splits["splits"]]
        chosen = "train" if "train" in names else names[0] if names else ""
        others = [directory / SPLITS, *(path for n in names if n != chosen for path in (directory / n).glob("*"))]
        files, beside = saved_files(directory / chosen) if chosen else ([], [])
        return files, beside + others
    state = _json(directory / DATASET)
    listed = state.get("_data_files") if state else None
    if not isinstance(listed, list):
        return [], []
    files = [directory / str(one["filename"]) for one in listed if isinstance(one, dict) and "filename" in one]
    return files, [path for path in directory.glob("*") if path not in files]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _weights(file: SourceFile) -> list[int]:
    """Bytes of each row group or record batch; [] where that is not known."""
    import pyarrow as pa

    try:
        if file.kind == PARQUET:
            with _open_parquet(file) as table:
                groups = table.metadata
                return [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
        if scheme_of(file.path):
            return []  # to look for the batches would read the file
        with pa.memory_map(file.path) as source:
            return [batch.nbytes for batch in _batches(source)]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.corpus: {file.path} is no {file.kind} file: {error}") from error


@contextmanager
def _open_parquet(file: SourceFile) -> Generator[Any]:
    import pyarrow.parquet as pq

    with (
        open_binary(file.path) as source,
        pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as table,
    ):
        yield table


def _parquet(file: SourceFile, text_field: str) -> Iterator[Any]:
    with _open_parquet(file) as table:
        name = _column(table.schema_arrow, file, text_field)
        for group in range(file.begin, file.begin + (file.count or table.metadata.num_row_groups)):
            found = table.metadata.row_group(group)
            row_bytes = found.total_byte_size // max(found.num_rows, 1)
            rows = min(max(ROWS_BYTES // max(row_bytes, 1), 1), ROWS)
            for batch in table.iter_batches(rows, row_groups=[group], columns=[name]):
                yield batch.column(name)


def _arrow(file: SourceFile, text_field: str) -> Iterator[Any]:
    import pyarrow as pa

    # What is read whole need not be mapped: a file that becomes shorter meanwhile would end this process.
    far = bool(scheme_of(file.path)) or not file.count
    with open_binary(file.path) if far else pa.memory_map(file.path) as source:
        name = ""
        for index, batch in enumerate(_batches(source)):
            if file.count and index >= file.begin + file.count:
                return
            if index >= file.begin:
                name = name or _column(batch.schema, file, text_field)
                column = _undamaged(batch.column(name))
                rows = min(max(ROWS_BYTES * len(column) // max(column.nbytes, 1), 1), ROWS)
                for begin in range(0, len(column), rows):
                    yield column.slice(begin, rows)


def _undamaged(column: Any) -> Any:
    """The column. Its memory is the file's, and offsets in it that point elsewhere would end this process.

    Raises:
        ArrowInvalid: there are such.
    """
    import pyarrow as pa

    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column.validate()
    (column.view(plain[column.type]) if column.type in plain else column).validate(full=True)
    return column


def _batches(source: Any) -> Iterator[Any]:
    """The record batches of a stream, as `datasets` writes it, or of a file of Arrow's (Feather)."""
    import pyarrow as pa

    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from pa.ipc.open_stream(source)


def _column(schema: Any, file: SourceFile, text_field: str) -> str:
    """The name of the column with the text."""
    import pyarrow as pa

    def is_text(name: str) -> bool:
        if schema.names.count(name) > 1:
            raise UserError(f"data.corpus: {file.path} has several columns named {name}, so none of them can be read.")
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    fields = (text_field,) if text_field else TEXT_FIELDS
    for name in fields:
        if name in schema.names and is_text(name):
            return name
    others = [name for name in schema.names if schema.names.count(name) == 1 and is_text(name)]
    hint = f"data.text_field can be {', '.join(others)}" if others else "it has none"
    raise UserError(f"data.corpus: {file.path} has no column of text named {' or '.join(fields)}; {hint}.")
