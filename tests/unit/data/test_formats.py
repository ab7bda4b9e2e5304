"""Corpora in other formats than plain text: compressed, tables, from servers, and tokens of other trainers."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_moe.data.corpus import cut_into_parts, list_files
from elastic_moe.data.prepare import prepare
from elastic_moe.data.source_file import Part
from elastic_moe.data.tokenizer import BpeTokenizer, load_tokenizer
from elastic_moe.errors import UserError
from tests.corpora import config_of, serving, texts_of

TEXTS = [f"document {i}, Grüße\n" * (1 + i % 50) for i in range(3000)]


# --- compressed -------------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    """Two frames, one after the other, as parallel compressors write them."""
    half = len(data) // 2
    return b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in (data[:half], data[half:]))


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    text = "".join(TEXTS)
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKED[suffix](text.encode()))
    lines = "\n".join(json.dumps({"content": one}) for one in TEXTS[:50])
    (tmp_path / f"b.jsonl{suffix}").write_bytes(PACKED[suffix](lines.encode()))
    assert texts_of(tmp_path) == [text, *TEXTS[:50]]


@pytest.mark.parametrize("suffix", PACKED)
def test_damaged_compressed_files_are_a_sentence(suffix: str, tmp_path: Path) -> None:
    data = PACKED[suffix](np.random.default_rng(0).bytes(200_000).hex().encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"cannot read .*a\.txt\{suffix}"):
        texts_of(tmp_path)


# --- tables -----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, column: str = "text", rows: int = 100) -> None:
    table = pa.table({"id": list(range(len(TEXTS))), column: [*TEXTS[:-2], None, ""]})
    pq.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("part_bytes", [0, 20_000])
def test_parquet(part_bytes: int, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    assert texts_of(tmp_path, part_bytes) == TEXTS[:-2]
    parts = cut_into_parts(list_files(config_of(tmp_path)).files, Part(0, ()), part_bytes)
    assert (len(parts) > 5) == bool(part_bytes)


def test_the_column_of_a_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", column="body")
    assert texts_of(tmp_path, text_field="body") == TEXTS[:-2]
    with pytest.raises(UserError, match=r"a\.parquet has no column of text named text or content; .* can be body\."):
        texts_of(tmp_path)
    with pytest.raises(UserError, match=r"no column of text named id; data\.text_field can be body"):
        texts_of(tmp_path, text_field="id")


def test_the_field_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1, "body": "b"}\n')
    assert texts_of(tmp_path, text_field="body") == ["b"]
    with pytest.raises(UserError, match=r"under text or content; data\.text_field names another field"):
        texts_of(tmp_path)


def test_damaged_tables_are_a_sentence(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"a\.parquet"):
        texts_of(tmp_path, 1000)
    (tmp_path / "a.parquet").write_bytes(data[:4] + bytes(10_000) + data[10_004:])
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        texts_of(tmp_path)


def save_to_disk(directory: Path, shards: list[list[str]]) -> None:
    """What `datasets.Dataset.save_to_disk` writes."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"text": texts})
        with pa.OSFile(str(directory / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))


@pytest.mark.parametrize("part_bytes", [0, 20_000])
def test_a_saved_dataset(part_bytes: int, tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set", [TEXTS[:1000], TEXTS[1000:]])
    assert texts_of(tmp_path / "set", part_bytes) == TEXTS
    assert list_files(config_of(tmp_path / "set")).skipped == {"beside the saved dataset": 2}


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set" / "test", [["of the test"]])
    save_to_disk(tmp_path / "set" / "train", [TEXTS])
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    assert texts_of(tmp_path / "set") == TEXTS
    assert texts_of(tmp_path / "set" / "test") == ["of the test"]


def test_a_file_of_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    assert texts_of(tmp_path, 20_000) == TEXTS


# --- servers ----------------------------------------------------------------------------------------------------------


class Ranges(SimpleHTTPRequestHandler):
    """Serves files, with byte ranges. Attributes: `failing`, so many requests are still refused."""

    failing = 0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_head(self) -> Any:
        if self.command == "GET" and type(self).failing > 0:
            type(self).failing -= 1
            self.send_error(503)
            return None
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().send_head()
        data, (first, _, last) = path.read_bytes(), asked.removeprefix("bytes=").partition("-")
        wanted = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(wanted) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(wanted)))
        self.end_headers()
        return io.BytesIO(wanted)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler: type[BaseHTTPRequestHandler] = partial(Ranges, directory=str(tmp_path))  # type: ignore[assignment]
    with serving(handler) as address:
        yield address


def test_files_of_a_web_server(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("".join(TEXTS).encode()))
    write_parquet(tmp_path / "a.parquet")
    assert "".join(texts_of(f"{server}/a.txt", 20_000)) == "".join(TEXTS)
    assert "".join(texts_of(f"{server}/a.txt.gz")) == "".join(TEXTS)
    assert texts_of(f"{server}/a.parquet", 20_000) == TEXTS[:-2]
    with pytest.raises(UserError, match=r"data\.corpus=http://.*/none\.txt cannot be reached"):
        texts_of(f"{server}/none.txt")
    with pytest.raises(UserError, match=r"ftp:// cannot be read; it can be s3://"):
        texts_of("ftp://host/a.txt")


def test_a_server_that_fails_for_a_moment(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", 300_000)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    config = config_of(f"{server}/a.txt", processes=2)
    parts = cut_into_parts(list_files(config).files, Part(0, ()))
    assert len(parts) > 3

    def told(what: str, done: int, total: int) -> None:
        if what == "encoding" and not asked:
            asked.append(what)
            Ranges.failing = 3

    asked: list[str] = []
    prepared = prepare(config, tmp_path / "cache", told)
    assert Ranges.failing == 0
    tokens = len(prepared.train) + len(prepared.val)
    assert tokens == len("".join(TEXTS).encode()) + 1


# --- tokens -----------------------------------------------------------------------------------------------------------

DOCUMENTS = [np.arange(i % 40 + 1, dtype=np.int32) * 7 % 900 for i in range(2000)]


def write_megatron(path: Path, documents: list[np.ndarray], code: int = 4) -> None:
    """`NAME.bin` and `NAME.idx`, as Megatron's IndexedDatasetBuilder writes them."""
    kind = {4: np.int32, 8: np.uint16}[code]
    path.with_suffix(".bin").write_bytes(b"".join(one.astype(kind).tobytes() for one in documents))
    lengths = np.array([len(one) for one in documents], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * np.dtype(kind).itemsize])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    places = np.arange(len(lengths) + 1, dtype=np.int64)
    path.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + pointers.astype(np.int64).tobytes() + places.tobytes()
    )


def tokens_of(prepared: Any) -> list[int]:
    """All tokens, those for validation last."""
    found: list[int] = []
    for shard in (prepared.train, prepared.val):
        tokens, targets = shard.batch(range(shard.num_samples(1)), 1)
        found += [*tokens[:, 0].tolist(), int(targets[-1, 0])]
    return found


@pytest.mark.parametrize("code", [4, 8])
@pytest.mark.parametrize("part_bytes", [1 << 24, 4000])
def test_megatron(code: int, part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", part_bytes)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    write_megatron(tmp_path / "set" if (tmp_path / "set").mkdir() else tmp_path / "set" / "a", DOCUMENTS, code)
    config = config_of(tmp_path / "set", tokenizer="ids", vocab_size=1000)
    prepared = prepare(config, tmp_path / "cache")
    assert sorted(tokens_of(prepared)) == sorted(np.concatenate(DOCUMENTS).tolist())
    assert "2,000 documents" in prepared.summary
    assert 0.05 < len(prepared.val) / len(prepared.train) < 0.2
    assert load_tokenizer(prepared.tokenizer_path).encode("3 five 999 1000") == [3, 999]


def test_megatron_with_its_tokenizer_gets_ends(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    tokenizer = BpeTokenizer.train(["some text"] * 9, 300)
    (tmp_path / "tok").mkdir()
    tokenizer.export(tmp_path / "tok")
    documents = [np.array(tokenizer.encode(f"text {i}"), np.int32) for i in range(500)]
    documents[7] = np.append(documents[7], tokenizer.end_id)
    write_megatron(tmp_path / "set" / "a", documents)
    prepared = prepare(config_of(tmp_path / "set", tokenizer=str(tmp_path / "tok")), tmp_path / "cache")
    assert tokens_of(prepared).count(tokenizer.end_id) == 500


@pytest.mark.parametrize("header", [False, True])
def test_flat_files(header: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", 100_000)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    ids = np.arange(200_000, dtype=np.uint16) % 5000
    root = tmp_path / "set"
    root.mkdir()
    for name, own in (("train.bin", ids), ("val.bin", ids[:777])):
        head = np.zeros(256, np.int32)
        head[:3] = 20240520, 1, len(own)
        (root / name).write_bytes((head.tobytes() if header else b"") + own.tobytes())
    (root / "meta.pkl").write_bytes(b"\x80\x04K\x01.")
    prepared = prepare(config_of(root, tokenizer="ids", vocab_size=5000), tmp_path / "cache")
    assert (len(prepared.train), len(prepared.val)) == (len(ids), 777), "val.bin is for validation, and nothing else"
    assert tokens_of(prepared) == [*ids.tolist(), *ids[:777].tolist()]
    one = prepare(config_of(root / "train.bin", tokenizer="ids", vocab_size=5000), tmp_path / "cache")
    assert 0.05 < len(one.val) / len(one.train) < 0.2


def test_tokens_that_do_not_fit_are_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    write_megatron(root / "a", DOCUMENTS)
    for changes, message in (
        ({}, r"a\.bin holds tokens, not text: name their tokenizer"),
        ({"tokenizer": "ids", "vocab_size": 260}, r"holds the token \d+, and data\.tokenizer has only 260"),
        ({"tokenizer": "ids", "vocab_size": 1000, "dedup": "exact"}, r"data\.dedup=exact compares text"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(config_of(root, **changes), tmp_path / "cache")
    (root / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds tokens .*a\.bin\) and text .*b\.txt\): choose by data\.pattern"):
        prepare(config_of(root, tokenizer="ids", vocab_size=1000), tmp_path / "cache")
    (root / "a.bin").write_bytes((root / "a.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"a\.idx does not fit a\.bin"):
        prepare(config_of(root, pattern="*.bin", tokenizer="ids", vocab_size=1000), tmp_path / "cache")


def test_a_binary_file_among_texts_is_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(200)) * 2)
    (tmp_path / "a.txt").write_text("text")
    assert texts_of(tmp_path) == ["text"]


def test_a_tokenizer_may_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    BpeTokenizer.train(TEXTS, 400).export(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    one = prepare(config_of(tmp_path / "a.txt", tokenizer=str(tmp_path / "tok")), tmp_path / "cache")
    other = prepare(config_of(tmp_path / "a.txt", tokenizer=str(tmp_path / "tok/tokenizer.json")), tmp_path / "cache")
    assert one == other
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"data\.tokenizer=.*none is neither"):
        prepare(config_of(tmp_path / "a.txt", tokenizer=str(tmp_path / "none")), tmp_path / "cache")
