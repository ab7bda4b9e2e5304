"""An S3 server in a process of its own, and a proxy before it that fails as an object store fails.

The server is moto's. The proxy is an HTTP server in a thread of the test. The test sets a `Fault`, and may clear it at
any time: what hangs then goes on.
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

START_S = 120.0
BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
_ERRORS = {500: "InternalError", 403: "AccessDenied", 503: "SlowDown"}


@dataclass(frozen=True)
class Fault:
    """What the proxy does to a request.

    Attributes:
        kind: "500", "503" or "403" (the answer), "hang", "cut upload", "cut download" (the connection ends in the
            middle), or "slow"; "" for none.
        methods: it hits these.
        path: and these paths with their queries, a regular expression that is searched.
    """

    kind: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    path: str = ""


READS, WRITES = ("GET", "HEAD"), ("PUT", "POST", "DELETE")


class Proxy(ThreadingHTTPServer):
    """The proxy. Attributes: `fault`, set by the test; `hits`, the requests that met a fault."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, server_port: int) -> None:
        self.fault, self.hits, self.server_to = Fault(), 0, server_port
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that ends a connection is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]
    skipped: ClassVar[set[str]] = {"transfer-encoding", "connection", "content-length", "expect"}
    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _serve(self) -> None:
        fault = self.server.fault
        hit = self.command in fault.methods and re.search(fault.path, self.path) is not None
        kind = fault.kind if hit else ""
        self.server.hits += bool(kind)
        if kind == "cut upload":
            self.rfile.read(min(int(self.headers.get("Content-Length") or 1), 1 << 20) // 2)
            return self._cut()
        body = self._body()
        if kind == "hang":
            while self.server.fault is fault:
                time.sleep(0.02)
            return self._cut()
        if kind.isdigit():
            return self._answer(int(kind), {}, _error(int(kind)))
        status, headers, answer = self._forward(body)
        if kind == "cut download" and self.command == "GET":
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2])
            return self._cut()
        if kind == "slow":
            time.sleep(0.5)
        return self._answer(status, headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.server.server_to, timeout=120)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in self.skipped}
            server.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = server.getresponse()
            content = answer.read()
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in self.skipped}
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, kept, content
        finally:
            server.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True


def _error(status: int) -> bytes:
    code = _ERRORS[status]
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} by the test</Message></Error>".encode()


@contextmanager
def s3_server(directory: Path) -> Iterator[int]:
    """Run the server; its log is in the directory. Yields its port."""
    log = directory / "s3.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stdout=file, stderr=file
        )
    try:
        deadline_s = time.monotonic() + START_S
        while (found := re.search(rb"http://127.0.0.1:(\d+)", log.read_bytes())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, "the S3 server does not start"
            time.sleep(0.05)
        port = int(found[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        connection.request("PUT", f"/{BUCKET}", headers={"Host": "127.0.0.1", "Authorization": _AUTHORIZATION})
        assert connection.getresponse().status == 200
        connection.close()
        yield port
    finally:
        process.kill()
        process.wait()


_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"


@contextmanager
def faulty_proxy(server_port: int) -> Iterator[Proxy]:
    """Run the proxy."""
    proxy = Proxy(server_port)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), name="s3-proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.fault = Fault()
        proxy.shutdown()
        for connection in list(proxy.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        proxy.server_close()
        thread.join()


def variables(proxy: Proxy) -> dict[str, str]:
    """Environment variables that make S3 clients use the proxy."""
    return CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint(proxy)}


def endpoint(proxy: Proxy) -> str:
    """Its address as a URL."""
    return f"http://127.0.0.1:{proxy.server_port}"
