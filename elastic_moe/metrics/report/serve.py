"""The page of a run that goes on: a small HTTP server on this machine, from which an open page asks for news.

The runs are read again at most once per `REFRESH_S`, or per `LOAD` times the time that reading took, however many
pages are open. The server gives nothing but the page and its data, and takes nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from socket import AF_INET6

from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import page, page_data, read_runs
from elastic_moe.metrics.report.run_data import RunReader

REFRESH_S = 3.0
LOAD = 10.0  # reading takes at most one part in so many of the time
CONNECTIONS = 32  # at once
TIMEOUT_S = 30.0  # of a connection on which nothing comes
PORT = 8770


class Content:
    """The page and its data as they are now. Safe to call from several threads.

    Args:
        readers: of the runs.
    """

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self._readers, self._lock = readers, threading.Lock()
        self._next_s, self._every_s = 0.0, REFRESH_S
        self._runs: list[dict[str, object]] = []
        self._data, self._tag, self._trouble = b"", "", ""

    def data(self) -> tuple[bytes, str]:
        """The data as JSON, and their tag, which changes with them; empty as long as no step is committed."""
        with self._lock:
            self._refresh()
            return self._data, self._tag

    def page(self) -> bytes:
        """The page; as long as there is no step, one that says so and loads itself again."""
        with self._lock:
            self._refresh()
            if self._runs:
                live = {"url": "data", "every_s": self._every_s, "tag": self._tag}
                return page(self._runs, live).encode()
            refresh = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S:g}">'
            return f"{refresh}<title>waiting</title><p>{html.escape(self._trouble)}</p>".encode()

    def _refresh(self) -> None:
        began_s = time.monotonic()
        if began_s < self._next_s:
            return
        try:
            self._runs = read_runs(self._readers)
        except (UserError, OSError) as error:
            self._trouble = f"{error} This page waits for the first step."
        else:
            told = [{key: value for key, value in run.items() if key != "made_s"} for run in self._runs]
            self._tag = f'"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}"'
            self._data = json.dumps(page_data(self._runs), separators=(",", ":"), allow_nan=False).encode()
        took_s = time.monotonic() - began_s
        self._every_s = round(max(REFRESH_S, LOAD * took_s), 1)
        self._next_s = time.monotonic() + self._every_s


class ReportServer(ThreadingHTTPServer):
    """Serves one page.

    Args:
        readers: of the runs.
        host: name or address to listen at.
        port: 0 for any that is free.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True

    def __init__(self, readers: Sequence[RunReader], host: str, port: int) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.content, self._slots = Content(readers), threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), _Handler)
        self.local = ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def process_request(self, request: object, client_address: object) -> None:
        """Hand a connection to a thread, or close it when there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # type: ignore[assignment]
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        if not self._for_us():
            self.send_error(403, "another host is meant")
        elif self.path in ("/", "/index.html"):
            self._send(self.server.content.page(), "text/html; charset=utf-8", "")
        elif self.path == "/data":
            data, tag = self.server.content.data()
            if tag and self.headers.get("If-None-Match") == tag:
                self.send_response(304)
                self.send_header("ETag", tag)
                self.end_headers()
            else:
                self._send(data, "application/json", tag)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _for_us(self) -> bool:
        """Whether the request names this machine: a page of another site could have its name led here."""
        name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        return not self.server.local or name in ("localhost", "127.0.0.1", "[::1]", str(self.server.server_address[0]))

    def _send(self, body: bytes, kind: str, tag: str) -> None:
        packed = "gzip" in (self.headers.get("Accept-Encoding") or "")
        body = gzip.compress(body, 5) if packed else body
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if packed:
            self.send_header("Content-Encoding", "gzip")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are of no interest."""
