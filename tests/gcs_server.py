"""A Google Cloud Storage server in a process of its own: an emulator that keeps objects in memory."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

START_S = 120.0
BUCKET = "bucket"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class GcsServer:
    """The server. Attributes: `process`, to be stopped and killed by a test; `variables`, by which clients find it."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def variables(self) -> dict[str, str]:
        return variables(self.port)


def variables(port: int) -> dict[str, str]:
    """By which clients find a server, or a proxy before it."""
    return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://{HOST}:{port}"}


@contextmanager
def gcs_server(directory: Path) -> Iterator[GcsServer]:
    """Run the server; its log is in the directory."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with (directory / "gcs.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.gcs_server", str(port)], stdout=log, stderr=log)
    try:
        _wait(process, port, directory / "gcs.log")
        yield GcsServer(process, port)
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, "the server does not start"
        with suppress(OSError):
            connection = http.client.HTTPConnection(HOST, port, timeout=START_S)
            connection.request("GET", f"/storage/v1/b/{BUCKET}")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)


def _main(port: int) -> None:
    from gcp_storage_emulator import server  # pyright: ignore[reportMissingTypeStubs]

    server.server.HTTPServer = ThreadingHTTPServer  # a client asks while it still reads another answer
    server.create_server(HOST, port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    _main(int(sys.argv[1]))
