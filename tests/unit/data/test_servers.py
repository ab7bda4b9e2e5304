"""Servers that cut, stall, refuse, do not tell a length, or change their files; and files of a disk that change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.data import location
from elastic_moe.data.corpus import cut_into_parts, list_files
from elastic_moe.data.location import open_binary
from elastic_moe.data.pieces import read_documents, read_pieces
from elastic_moe.data.prepare import prepare
from elastic_moe.data.source_file import Part
from elastic_moe.errors import UserError
from tests.corpora import config_of, serving

TEXT = "".join(f"line {i} of a file\n" for i in range(150_000))
BODY = TEXT.encode()


class Odd(BaseHTTPRequestHandler):
    """Serves BODY. The first element of the path says how: `ranges`, `plain` (without ranges),
    `untold` (without, too, and without a word), `chunked`, `silent`.

    Attributes:
        bodies: how many further bodies are cut in the middle.
        refused: how many further requests are answered with 503.
        etag: of the file.
        ended: set at the end, for what waits.
    """

    protocol_version = "HTTP/1.1"
    bodies, refused, etag = 0, 0, "1"
    ended = threading.Event()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(BODY)

    def answer(self, body: bytes) -> None:
        kind, size = self.path.split("/")[1], len(BODY)
        if body and type(self).refused:
            type(self).refused -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range") if kind == "ranges" else None
        if asked and body:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            body = body[int(first) : int(last or size) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{type(self).etag}"')
        chunked = kind == "chunked"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) or size))
        if kind == "plain":
            self.send_header("Accept-Ranges", "none")
        self.end_headers()
        cut = bool(body) and type(self).bodies > 0
        type(self).bodies -= cut
        if kind == "silent" and body:
            self.ended.wait(60)
        sent = body[: len(body) // 2] if cut else body
        if chunked and body:
            sent = b"%x\r\n%b\r\n" % (len(sent), sent) + (b"" if cut else b"0\r\n\r\n")
        self.wfile.write(sent)
        self.close_connection = cut


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(location, "PAUSE_S", 0.01)
    monkeypatch.setattr(Odd, "ended", threading.Event())
    for name in ("bodies", "refused", "etag"):
        monkeypatch.setattr(Odd, name, getattr(Odd, name))
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)  # a reader may go before the end
    with serving(Odd, Odd.ended.set) as address:
        yield address


def text_of(corpus: str | Path, part_bytes: int = 0) -> str:
    parts = cut_into_parts(list_files(config_of(corpus)).files, Part(0, ()), part_bytes)
    return "".join(piece.text for part in parts for piece in read_pieces(part.files, 0, 700))


@pytest.mark.parametrize("kind", ["ranges", "plain", "untold", "chunked"])
def test_a_body_that_is_cut_is_asked_for_again(server: str, kind: str) -> None:
    files = list_files(config_of(f"{server}/{kind}/a.txt")).files
    Odd.bodies, Odd.refused = 2, 1
    assert "".join(piece.text for piece in read_pieces(files, 0, 700)) == TEXT
    assert Odd.bodies == Odd.refused == 0


def test_the_first_look_and_the_sample_are_asked_for_again(server: str, tmp_path: Path) -> None:
    Odd.refused = 3
    prepared = prepare(config_of(f"{server}/plain/a.txt", tokenizer="bpe", vocab_size=300), tmp_path)
    assert f"{len(BODY) / 1e6:.3g} MB of text from files of {len(BODY) / 1e6:.3g} MB" in prepared.summary


def test_a_length_that_is_not_told(server: str, tmp_path: Path) -> None:
    prepared = prepare(config_of(f"{server}/chunked/a.txt"), tmp_path)
    assert len(prepared.train) + len(prepared.val) == len(BODY) + 1
    assert f"{len(BODY) / 1e6:.3g} MB of text from files of unknown size" in prepared.summary


@pytest.mark.parametrize("kind", ["plain", "untold"])
def test_a_server_without_ranges_is_read_from_begin_to_end(server: str, kind: str) -> None:
    files = list_files(config_of(f"{server}/{kind}/a.txt")).files
    assert len(cut_into_parts(files, Part(0, ()), 100_000)) == 1
    assert text_of(f"{server}/{kind}/a.txt", 100_000) == TEXT
    assert len(cut_into_parts(list_files(config_of(f"{server}/ranges/a.txt")).files, Part(0, ()), 100_000)) > 20
    with open_binary(files[0].path) as stream:
        stream.seek(-500, os.SEEK_END)
        assert stream.read() == BODY[-500:]
        stream.seek(70_000)
        assert stream.read(9) == BODY[70_000:70_009]


def test_a_body_that_is_always_cut_is_a_sentence(server: str) -> None:
    files = list_files(config_of(f"{server}/chunked/a.txt")).files
    Odd.bodies = 1000
    with pytest.raises(UserError, match=r"cannot read http://.*/chunked/a\.txt: "):
        list(read_pieces(files, 0, 700))


def test_what_a_server_refuses_is_told_at_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "PAUSE_S", 60.0)
    Odd.refused = 1000
    monkeypatch.setattr(Odd, "do_HEAD", lambda self: self.send_error(403))
    monkeypatch.setattr(Odd, "do_GET", lambda self: self.send_error(403))
    with pytest.raises(UserError, match=r"cannot be reached: 403, message='Forbidden'"):
        text_of(f"{server}/plain/a.txt")


def test_a_silent_server_is_a_sentence(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "SILENCE_S", 0.3)
    location._server.cache_clear()
    begun_s = time.monotonic()
    with pytest.raises(UserError, match=r"cannot read http://.*/silent/a\.txt: its server says nothing for 0\.3 s"):
        text_of(f"{server}/silent/a.txt")
    assert time.monotonic() - begun_s < 20


@pytest.mark.parametrize("documents", [False, True])
def test_a_file_of_a_server_that_changes_is_a_sentence(server: str, documents: bool) -> None:
    files = list_files(config_of(f"{server}/ranges/a.txt")).files
    Odd.etag = "2"
    read = (document.read() for document in read_documents(files, "")) if documents else read_pieces(files, 0, 700)
    with pytest.raises(UserError, match=r"ranges/a\.txt has changed while it was read; start again"):
        list(read)


@pytest.mark.parametrize("part_bytes", [0, 100_000])
@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "other"])
def test_a_file_that_changes_while_it_is_read_is_a_sentence(change: str, part_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    parts = cut_into_parts(list_files(config_of(path)).files, Part(0, ()), part_bytes)
    pieces = (piece for part in parts for piece in read_pieces(part.files, 0, 700))
    next(pieces)
    match change:
        case "longer":
            with path.open("a") as stream:
                stream.write("more\n")
        case "shorter":
            os.truncate(path, len(BODY) // 2)
        case "gone":
            path.unlink()
        case _:
            path.write_text(TEXT.swapcase())
    with pytest.raises(UserError, match=r"a\.txt(: No such file| has changed while it was read)"):
        list(pieces)
