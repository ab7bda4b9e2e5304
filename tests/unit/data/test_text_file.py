"""Corpora as the world has them: encodings, compression, JSONL, hidden files, links; and the line that tells of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.corpus import list_files
from elastic_moe.data.pieces import read_pieces
from elastic_moe.data.prepare import prepare
from elastic_moe.data.text_file import encoding_of
from elastic_moe.errors import UserError

TEXT = "Grüße an Zoë, ça va?\nA second line.\n" * 40


def text_of(root: Path, **changes: Any) -> list[str]:
    """The documents of a corpus."""
    documents = [""]
    for piece in read_pieces(list_files(DataConfig(corpus=str(root), **changes)).files, 0, 700):
        documents[-1] += piece.text
        if piece.ends:
            documents.append("")
    return documents[:-1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-32"])
@pytest.mark.parametrize("compressed", [False, True])
def test_encodings(encoding: str, compressed: bool, tmp_path: Path) -> None:
    data = TEXT.encode(encoding)
    path = tmp_path / ("a.txt.gz" if compressed else "a.txt")
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert text_of(tmp_path) == [TEXT]


def test_windows_1252_and_damaged_utf_8() -> None:
    assert encoding_of("“Zoë” – 5 €".encode("cp1252")) == "cp1252"
    assert encoding_of("Grüße, Zoë, ça".encode() + b"\xff") == "utf-8"
    assert encoding_of("Grüße".encode()[:3]) == "utf-8"  # cut within a character
    assert encoding_of(b"\x7fELF\0\0") is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_of_jsonl_is_a_document(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"id": 1, "text": "first\nä"}), "", json.dumps({"content": "second"}), json.dumps("third")]
    data = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert text_of(tmp_path) == ["first\nä", "second", "third"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2 has no text under text or content"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2 is no JSON"),
        ("a.txt.gz", b"no gzip", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(bytes(range(1, 128)) * 9999)[:-20], r"cannot read .*a\.txt\.gz"),
    ],
)
def test_damaged_files_are_a_sentence(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        text_of(tmp_path)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    for name, data in {
        "a.txt": TEXT.encode(),
        "b.txt": TEXT.encode("latin-1"),
        "c.bin": b"\0\1",
        "d.txt": b"",
        "x~": b"x",
        ".a.txt.swp": b"x",
        "#a#": b"x",
        ".git/config": b"x",
        ".idea/w.xml": b"x",
        "e.txt": (TEXT * 9).encode() + b"\xff",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    config = DataConfig(corpus=str(root), tokenizer="bytes", seq_len=32, val_fraction=0.1, max_bytes=0)
    summary = prepare(config, tmp_path / "cache").summary
    assert summary.startswith("corpus: 3 files read, 1 in latin-1, 7 left out (4 hidden or an editor's, ")
    for part in ("1 not text", "1 empty", "1 broken link", "MB of text from files of", "% of it U+FFFD"):
        assert part in summary
    assert prepare(config, tmp_path / "cache").summary == summary  # from the cache too
    limited = DataConfig(**{**vars(config), "max_bytes": 2000})
    assert "2 beyond data.max_bytes" in prepare(limited, tmp_path / "cache").summary


def test_a_directory_of_links(tmp_path: Path) -> None:
    (tmp_path / "blobs" / "sub").mkdir(parents=True)
    (tmp_path / "blobs" / "sub" / "1").write_text("one")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.txt").symlink_to(tmp_path / "blobs" / "sub" / "1")
    (tmp_path / "root" / "deep").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs" / "again").symlink_to(tmp_path / "root")  # a circle
    assert text_of(tmp_path / "root") == ["one", "one"]
    assert text_of(tmp_path / "root", pattern="*.txt") == ["one"]
    assert text_of(tmp_path / "root", pattern="**/sub/*") == ["one"]


@pytest.mark.parametrize("corpus", ["", "  "])
def test_an_empty_path_is_refused(corpus: str) -> None:
    with pytest.raises(UserError, match=r"data\.corpus"):
        list_files(DataConfig(corpus=corpus))
