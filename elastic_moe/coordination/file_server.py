"""Serves directories of the coordinator's node to the workers that do not see them.

A few machines need no network file system: the corpus, a model to begin with and the checkpoints are on the node of the
coordinator, and `checkpoint/served.py` reads and writes them from elsewhere. Every request shows the run's token. Names
lead into the served directories only. The sizes and checksums of what is written are compared as those of every other
storage are.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from elastic_moe.checkpoint.bounded import Activity
from elastic_moe.checkpoint.local_file import is_regular, write_file
from elastic_moe.checkpoint.served import ERRNO
from elastic_moe.coordination.incoming import HELLO_TIMEOUT_S, Incoming, chunks

SILENCE_S = 60.0  # between two bytes of a peer that has shown the token
MAX_STRANGERS = 256  # connections that have not shown the token yet
LINGER_S = 5.0  # for a peer that is still writing when it is refused
JOIN_TIMEOUT_S = 5.0
LINGER_BYTES = 1 << 16
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A directory that is served. `writable`: workers may write into it."""

    directory: str
    writable: bool = False


class FileServer:
    """Serves from `start` to `close`, on any free port.

    Args:
        host: address to listen on.
        token: shared secret of the run.
        places: the directories, by the first part of a path.
    """

    def __init__(self, host: str, token: str, places: Mapping[str, Place]) -> None:
        self._host, self._token, self._places = host, token, dict(places)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> tuple[str, int]:
        """Begin to listen. Returns host and port.

        Raises:
            RuntimeError: it cannot listen on its host.
        """
        try:
            self._server = _Server(self._host, self._token, self._places)
        except OSError as error:
            raise RuntimeError(f"the file server cannot listen on {self._host}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="file-server", daemon=True)
        self._thread.start()
        return self._host, int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening, and cut the connections."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._thread.join(JOIN_TIMEOUT_S)


class _Server(ThreadingHTTPServer):
    """The listening socket, and a thread for each connection."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, host: str, token: str, places: Mapping[str, Place]) -> None:
        self.token, self.places = token.encode(), places
        self._lock = threading.Lock()
        self._strangers: dict[socket.socket, None] = {}  # in order of arrival
        self._known: set[socket.socket] = set()
        super().__init__((host, 0), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer asks a name server for the host's name: that can hang

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("the connection of %s broke", client_address, exc_info=True)

    def arrived(self, connection: socket.socket) -> None:
        """A connection was made. Of too many strangers, the one that has waited longest is cut off."""
        with self._lock:
            self._strangers[connection] = None
            surplus = next(iter(self._strangers)) if len(self._strangers) > MAX_STRANGERS else None
        if surplus is not None:
            _cut(surplus)

    def admitted(self, connection: socket.socket) -> None:
        """It has shown the token."""
        with self._lock:
            self._strangers.pop(connection, None)
            self._known.add(connection)

    def gone(self, connection: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(connection, None)
            self._known.discard(connection)

    def cut(self) -> None:
        """Cut all connections."""
        with self._lock:
            open_now = [*self._strangers, *self._known]
        for connection in open_now:
            _cut(connection)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


class _Refused(Exception):
    """A request that is answered with this status and sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One connection, with one request after another."""

    protocol_version = "HTTP/1.1"
    timeout = HELLO_TIMEOUT_S
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self._incoming)
        self._begun = False  # the answer to the present request
        self.server.arrived(self.connection)

    def finish(self) -> None:
        self.server.gone(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_PUT(self) -> None:
        self._answered(self._put)

    def _answered(self, action: Any) -> None:
        """Answer a request; every error is an answer too, unless it comes when a part of the answer is on its way."""
        self._begun = False
        try:
            self._admit()
            action()
        except _Refused as refused:
            self._refuse(refused.status, str(refused))
        except FileNotFoundError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except TimeoutError:
            self.close_connection = True  # of the connection
        except OSError as error:
            if self._begun:
                raise
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, error.strerror or str(error), error.errno or 0)

    def _admit(self) -> None:
        shown = (self.headers.get("Authorization") or "").removeprefix("Bearer ").encode(errors="replace")
        if not hmac.compare_digest(shown, self.server.token):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "wrong token")
        self.server.admitted(self.connection)
        self._incoming.known = True
        self.connection.settimeout(SILENCE_S)

    def end_headers(self) -> None:
        self._begun = True
        super().end_headers()

    def _refuse(self, status: HTTPStatus, sentence: str, number: int = 0) -> None:
        """Answer that a request failed. The connection ends, since parts of the request may be unread."""
        self.close_connection = True
        content = sentence.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        if number:
            self.send_header(ERRNO, str(number))
        self.end_headers()
        self.wfile.write(content)
        self._linger()

    def _linger(self) -> None:
        """Read on until the peer has seen the answer and stops: to close before would take the answer away from it."""
        self.wfile.flush()
        self.connection.settimeout(LINGER_S)
        deadline_s = time.monotonic() + LINGER_S
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline_s and self.connection.recv(LINGER_BYTES):
                pass
        except OSError:
            return  # it is gone

    def _target(self) -> tuple[Place, str, str]:
        """Place, path and query of a request."""
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        name, *parts = unquote(url.path).strip("/").split("/")
        place = self.server.places.get(name)
        if place is None or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise _Refused(HTTPStatus.NOT_FOUND, "no such file")
        return place, os.path.join(place.directory, *parts), url.query

    def _get(self) -> None:
        _, path, query = self._target()
        if query == "info":
            self._send_json(_described(Path(path)))
        elif query == "list":
            self._send_json(_listed(path))
        else:
            self._send_range(path)

    def _send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_range(self, path: str) -> None:
        """Send a range of a file."""
        if not is_regular(path):
            raise _Refused(HTTPStatus.FORBIDDEN, "it is no file")
        wanted = _RANGE.fullmatch(self.headers.get("Range") or "")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, size)
            if not start < stop <= size:
                raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"the file has {size} bytes")
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.flush()
            if self.connection.sendfile(file, start, stop - start) < stop - start:
                self.close_connection = True  # the file became shorter meanwhile

    def _put(self) -> None:
        place, path, _ = self._target()
        if not place.writable or path == place.directory:
            raise _Refused(HTTPStatus.FORBIDDEN, "workers do not write there")
        if self.headers.get("Transfer-Encoding") != "chunked":
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a file comes in chunks")
        write_file(path, chunks(self.rfile), Activity())
        self._send_json({})


def _described(path: Path) -> dict[str, Any]:
    """What is at a path; a broken link is nothing."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {"name": path.name, "kind": "none"}
    if path.is_dir():
        return {"name": path.name, "kind": "directory"}
    if not path.is_file():
        return {"name": path.name, "kind": "other"}
    return {"name": path.name, "kind": "file", "size": found.st_size, "changed_ns": found.st_mtime_ns}


def _listed(path: str) -> list[dict[str, Any]]:
    """What is in a directory; nothing if there is no such directory."""
    try:
        found = [_described(entry) for entry in Path(path).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in found if entry["kind"] != "none"]
