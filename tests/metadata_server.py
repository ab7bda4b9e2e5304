"""A server on this machine that answers like the metadata service of AWS, GCP or Azure, also when these fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps
from typing import Any
from urllib.parse import parse_qs, urlsplit

MACHINE = "worker_3"


@dataclass
class FakeCloud:
    """What the server says.

    Attributes:
        provider: aws, gcp or azure.
        url: where it listens.
        values: by path, what a question for it is answered with; a path that is not there is a 404.
        fault: "" | "error" | "garbage" | "slow" | "drip" | "refuse" (a token): how it fails.
        tokens: those that are valid.
        asked: every request: method, path, query.
        headers: of the latest request.
    """

    provider: str
    url: str = ""
    values: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    tokens: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def give_notice(self, seconds: float, **azure: Any) -> None:
        """From now on it says that the machine will be taken in so many seconds. GCP names no time."""
        at = datetime.fromtimestamp(time.time() + seconds, UTC)
        match self.provider:
            case "aws":
                told = dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})
                self.set("/latest/meta-data/spot/instance-action", told)
            case "gcp":
                self.set("/computeMetadata/v1/instance/preempted", "TRUE")
            case _:
                event = {"EventType": "Preempt", "Resources": [MACHINE], "EventStatus": "Scheduled"} | azure
                event = {"NotBefore": format_datetime(at, usegmt=True), "EventId": "f020ba2e"} | event
                self.set("/metadata/scheduledevents", dumps({"DocumentIncarnation": 2, "Events": [event]}))

    def set(self, path: str, value: str) -> None:
        with self.changed:
            self.values[path] = value
            self.changed.notify_all()

    def etag(self, path: str) -> str:
        return f"{hash(self.values.get(path)) & 0xFFFFFFFF:08x}"


def first_values(provider: str) -> dict[str, str]:
    """A machine that nobody takes."""
    match provider:
        case "aws":
            return {"/latest/meta-data/autoscaling/target-lifecycle-state": "InService"}
        case "gcp":
            of = "/computeMetadata/v1/instance"
            return {f"{of}/id": "42", f"{of}/preempted": "FALSE", f"{of}/maintenance-event": "NONE"}
        case _:
            events = dumps({"DocumentIncarnation": 1, "Events": []})
            return {"/metadata/instance/compute/name": MACHINE, "/metadata/scheduledevents": events}


class _Handler(BaseHTTPRequestHandler):
    cloud: FakeCloud

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        cloud = self._note()
        if cloud.provider != "aws" or urlsplit(self.path).path != "/latest/api/token":
            return self._answer(404, "")
        if cloud.fault == "refuse" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            return self._answer(400 if cloud.fault != "refuse" else 403, "")
        token = f"token{len(cloud.asked)}"
        cloud.tokens.add(token)
        return self._answer(200, token)

    def do_GET(self) -> None:
        cloud = self._note()
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if cloud.fault and self._fail():
            return None
        match cloud.provider:
            case "aws" if self.headers.get("X-aws-ec2-metadata-token") not in cloud.tokens:
                return self._answer(401, "")
            case "gcp" if self.headers.get("Metadata-Flavor") != "Google":
                return self._answer(403, "")
            case "azure" if self.headers.get("Metadata") != "true" or "api-version" not in query:
                return self._answer(400, "")
        if query.get("wait_for_change") == "true":
            with cloud.changed:
                cloud.changed.wait_for(
                    lambda: cloud.etag(parts.path) != query.get("last_etag"), float(query["timeout_sec"])
                )
        if parts.path not in cloud.values:
            return self._answer(404, "")
        return self._answer(200, cloud.values[parts.path], cloud.etag(parts.path))

    def _note(self) -> FakeCloud:
        parts = urlsplit(self.path)
        self.cloud.asked.append((self.command, parts.path, parts.query))
        self.cloud.headers = dict(self.headers)
        return self.cloud

    def _fail(self) -> bool:
        """Answer as the fault says; False if it does not concern this question."""
        match self.cloud.fault:
            case "error":
                self._answer(503, "busy")
            case "garbage":
                self._answer(200, "<html>not here</html>")
            case "slow":
                time.sleep(3.0)  # longer than the client under test waits
            case "drip":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(40):
                    try:
                        self.wfile.write(b"x")
                    except OSError:
                        break
                    time.sleep(0.1)
            case _:
                return False
        return True

    def _answer(self, status: int, body: str, etag: str = "") -> None:
        self.send_response(status)
        if self.cloud.provider == "gcp":
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@contextmanager
def metadata_server(provider: str) -> Iterator[FakeCloud]:
    """A server in a thread, which is gone afterwards."""
    cloud = FakeCloud(provider, values=first_values(provider))
    handler = type("Handler", (_Handler,), {"cloud": cloud})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False  # they are waited for
    cloud.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
