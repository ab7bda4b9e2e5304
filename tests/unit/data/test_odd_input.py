"""Corpora as users have them: odd, damaged, in disguise. Each is read as what it is, or refused by one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_moe.data.prepare import prepare
from elastic_moe.errors import UserError
from tests.corpora import config_of, texts_of

TEXTS = [f"document {i}, Grüße\n" * (1 + i % 9) for i in range(600)]


# --- text and JSON ----------------------------------------------------------------------------------------------------


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


ARRAY = [{"id": [{"x": "]"}], "text": text} for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c4-train.00000-of-01024.json", lines_of(TEXTS)),
        ("c4-train.00000-of-01024.json.gz", gzip.compress(lines_of(TEXTS))),
        ("A.JSONL", lines_of(TEXTS)),
        ("A.Json.GZ", gzip.compress(lines_of(TEXTS))),
        ("array.json", json.dumps(ARRAY).encode()),
        ("array.json", b"\xef\xbb\xbf \n" + json.dumps(ARRAY, indent=2, ensure_ascii=False).encode()),
        ("null.jsonl", lines_of(TEXTS) + b'{"text": null}\n{"text": ""}\n'),
    ],
)
def test_json_under_every_name(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert [text for text in texts_of(tmp_path, 9_000) if text] == TEXTS


def test_a_first_line_of_json_may_be_long(tmp_path: Path) -> None:
    long = "x" * 300_000
    (tmp_path / "lines.json").write_bytes(lines_of([long, "b"]))
    (tmp_path / "values.json").write_text(json.dumps([{"text": long}, {"text": "c"}]))
    assert texts_of(tmp_path) == [long, "b", long, "c"]


@pytest.mark.parametrize(
    "text", ['{"name": "a", "version": 2}', '[1, 2, "text"]', '[{"name": "text"}]', "[]", '{\n"a": 1}', "[", "{"]
)
def test_other_json_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(text)
    assert texts_of(tmp_path) == [text]


@pytest.mark.parametrize(
    "tail", [',{"text": 1}]', ",{]", "", "]]", '] {"text": "b"}', ',{"text": "b"', ", nothing]", ' {"text": "b"}]']
)
def test_damaged_arrays_are_a_sentence(tail: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}' + tail)
    with pytest.raises(
        UserError, match=r"a\.json, value 2 (is no JSON, or the array|has no text under text or content)"
    ):
        texts_of(tmp_path)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_a_damaged_second_stream_is_not_the_end(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix = ".bz2" if pack is bz2.compress else ".xz"
    half, rest = "".join(TEXTS[:300]), "".join(TEXTS[300:])
    first, second = pack(half.encode()), pack(rest.encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(first + (b"\0" * 8 if suffix == ".xz" else b"") + second)
    assert texts_of(tmp_path) == [half + rest]
    path.write_bytes(first + b"\xff" + second[1:])
    with pytest.raises(UserError, match=r"cannot read .*a\.txt"):
        texts_of(tmp_path)


def test_a_damaged_block_is_no_binary_file(tmp_path: Path) -> None:
    data = bytearray(bz2.compress("".join(TEXTS).encode() * 3))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.txt.bz2").write_bytes(data)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"cannot read .*a\.txt\.bz2"):
        texts_of(tmp_path)


def test_what_is_no_text_is_named_by_its_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "small.dat").write_bytes(b"\x01\x02\x9d\x14" * 9)  # a small binary file without a byte of 0
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no text \(1 not a file\) \(1 empty\) \(1 not text\); give a text file"):
        texts_of(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a form feed\x0c and colours \x1b[0m, d\xe9j\xe0 vu\n")
    assert texts_of(tmp_path) == ["a form feed\x0c and colours \x1b[0m, déjà vu\n"]


def test_a_directory_that_cannot_be_listed_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        texts_of(tmp_path)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_columns_of_text_in_every_type(tmp_path: Path) -> None:
    for index, column in enumerate((pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.string_view()))):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{index}.PARQUET")
    assert texts_of(tmp_path) == TEXTS * 2


def test_bytes_in_a_table_that_are_no_utf_8(tmp_path: Path) -> None:
    _, offsets, data = pa.array(TEXTS).buffers()
    broken = pa.StringArray.from_buffers(len(TEXTS), offsets, pa.py_buffer(bytes(data).replace(b"doc", b"d\xffc")))
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert texts_of(tmp_path) == [text.replace("doc", "d\ufffdc") for text in TEXTS]


def test_a_column_beside_one_with_a_nested_field_of_its_name(tmp_path: Path) -> None:
    table = pa.table({"a": [{"b": "nested"}] * len(TEXTS), "a.b": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts_of(tmp_path, text_field="a.b") == TEXTS
    twice = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has several columns named text"):
        texts_of(tmp_path)


def test_a_flipped_bit_in_a_page_with_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": TEXTS})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.find(b"document 77")] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: .*CRC"):
        texts_of(tmp_path)


@pytest.mark.parametrize("part_bytes", [0, 4000])
def test_offsets_of_a_damaged_arrow_file_end_no_process(part_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    assert texts_of(tmp_path, part_bytes) == TEXTS
    offsets = np.cumsum([0, *(len(text.encode()) for text in TEXTS[:100])]).astype("<i4").tobytes()
    data = path.read_bytes()
    for wrong in (-(1 << 30), 1 << 30):
        path.write_bytes(data.replace(offsets[40:80], np.full(10, wrong, "<i4").tobytes()))
        with pytest.raises(UserError, match=r"cannot read .*a\.arrow"):
            texts_of(tmp_path, part_bytes)


def test_a_file_that_a_saved_dataset_names_and_has_not(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    with pytest.raises(UserError, match=r"cannot read .*data-0\.arrow: No such file"):
        texts_of(tmp_path)


# --- tokens -----------------------------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 900, 20_000)


def ids_of(root: Path, **changes: Any) -> list[int]:
    prepared = prepare(config_of(root, **({"tokenizer": "ids", "vocab_size": 1000} | changes)), root.parent / "cache")
    return [token for shard in (prepared.train, prepared.val) for token in shard._tokens.tolist()]


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_flat_files_of_32_bits(vocab_size: int, tmp_path: Path) -> None:
    (root := tmp_path / "set").mkdir()
    ids = IDS * (vocab_size // 1000)
    (root / "interval_train.bin").write_bytes(ids.astype("<u4").tobytes())
    (root / "val.bin").write_bytes(ids[:500].astype("<u4").tobytes())
    assert ids_of(root, vocab_size=vocab_size) == [*ids.tolist(), *ids[:500].tolist()]


def head_of(magic: int, count: int) -> bytes:
    head = np.zeros(256, "<i4")
    head[:3] = magic, 1, count
    return head.tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IDS.astype("<u2").tobytes() + b"x", r"train\.bin has an odd number of bytes"),
        (head_of(20240521, 20_000) + IDS.astype("<u2").tobytes(), r"train\.bin begins with a header that is not known"),
        (head_of(20240520, 20_000) + IDS.astype("<u2").tobytes()[:-8], r"it has 20000 tokens, and by its size 19996"),
        (head_of(20240520, -5) + IDS.astype("<u2").tobytes(), r"by its header it has -5 tokens"),
    ],
)  # fmt: skip
def test_damaged_flat_files_are_a_sentence(data: bytes, message: str, tmp_path: Path) -> None:
    (root := tmp_path / "set").mkdir()
    (root / "train.bin").write_bytes(data)
    (root / "val.bin").write_bytes(IDS[:500].astype("<u2").tobytes())
    with pytest.raises(UserError, match=message):
        ids_of(root, vocab_size=65536)


def index_of(lengths: list[int], begins: list[int], magic: bytes = b"MMIDIDX\0\0", **head: int) -> bytes:
    places = np.cumsum([0, *lengths[:-1]]) * 2
    first = struct.pack("<QBQQ", 1, 8, head.get("sequences", len(lengths)), head.get("documents", len(begins)))
    arrays = (np.array(lengths, "<i4"), places.astype("<i8"), np.array(begins, "<i8"))
    return magic + first + b"".join(one.tobytes() for one in arrays)


LENGTHS, PLACES = [200] * 100, list(range(101))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (index_of(LENGTHS, PLACES, sequences=2**60), "does not fit"),
        (index_of(LENGTHS, PLACES, documents=2**63), "does not fit"),
        (index_of([400, -200, *LENGTHS[1:]], list(range(102))), "does not fit"),
        (index_of(LENGTHS, [0, 50, 20, 100]), "are not all sequences"),
        (index_of(LENGTHS, [0, 50]), "are not all sequences"),
        (index_of(LENGTHS, PLACES, magic=b"TNTIDX\0\0\0"), r"a\.idx is no index of Megatron's"),
    ],
)
def test_damaged_indexes_are_a_sentence(index: bytes, message: str, tmp_path: Path) -> None:
    (root := tmp_path / "set").mkdir()
    (root / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    (root / "a.idx").write_bytes(index_of([*LENGTHS[:-1], 0, 200, 0], [0, 0, *range(1, 103)]))
    assert sorted(ids_of(root)) == sorted(IDS.tolist())
    (root / "a.idx").write_bytes(index)
    with pytest.raises(UserError, match=message):
        ids_of(root)


def test_text_has_no_ids(tmp_path: Path) -> None:
    (root := tmp_path / "set").mkdir()
    (root / "train.bin").write_bytes(IDS.astype("<u2").tobytes())
    (root / "README.md").write_text("1 2 3 words\n" * 200)
    with pytest.raises(UserError, match=r"data\.tokenizer=ids is for files of tokens, and .*README\.md holds text"):
        ids_of(root)
    assert len(ids_of(root, pattern="*.bin")) == 20_000


def test_ids_below_zero_are_a_sentence(tmp_path: Path) -> None:
    (root := tmp_path / "set").mkdir()
    (root / "a.bin").write_bytes((-IDS).astype("<i2").tobytes())
    (root / "a.idx").write_bytes(index_of(LENGTHS, PLACES).replace(struct.pack("<QB", 1, 8), struct.pack("<QB", 1, 3)))
    with pytest.raises(UserError, match=r"holds the token -\d+, which no tokenizer has"):
        ids_of(root)
