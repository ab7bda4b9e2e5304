"""A server that answers as the Hugging Face hub does about one dataset: a mock, since the hub itself cannot be reached.

It knows what `huggingface_hub` asks to list a directory and to read a file in parts, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/texts"


def hub_of(files: Path) -> type[BaseHTTPRequestHandler]:
    """A handler that serves the files of a directory as a dataset."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silence."""

        def do_GET(self) -> None:
            self._answer(urlparse(self.path).path)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self._json([_entry(files, files / path) for path in asked["paths"] if path and (files / path).exists()])

        def _answer(self, path: str) -> None:
            api, resolve = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
            if path.startswith(resolve):
                self._file(files / unquote(path.removeprefix(resolve).partition("/")[2]))
            elif path == api or path.startswith(f"{api}/revision/"):
                self._json({"id": NAME, "sha": REVISION, "private": False, "tags": [], "siblings": [], "downloads": 0})
            elif path.startswith(f"{api}/tree/"):
                below = files / unquote(path.removeprefix(f"{api}/tree/").partition("/")[2])
                found = sorted(below.rglob("*")) if below.is_dir() else []
                self._json([_entry(files, one) for one in found])
            else:
                self._send(404, b"", {})

        def _file(self, file: Path) -> None:
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            data, status = file.read_bytes(), 200
            headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                data, status = data[int(first) : end], 206
            return self._send(status, data, headers)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Hub


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(files: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(files).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": REVISION}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
