"""The server of the page: gives the page and its data, and nothing else, to this machine."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_moe.metrics.report import serve
from elastic_moe.metrics.report.run_data import RunReader
from tests.unit.metrics.synthetic import step, write_run


@contextmanager
def served(run: Path) -> Iterator[tuple[str, int]]:
    with serve.ReportServer([RunReader(run)], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield "127.0.0.1", int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def ask(
    address: tuple[str, int], path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_page_and_data_and_nothing_else(tmp_path: Path) -> None:
    with served(write_run(tmp_path / "run")) as address:
        status, body, _ = ask(address, "/")
        assert status == 200
        assert b'"live":{"url":"data"' in body
        status, body, headers = ask(address, "/data", Accept_Encoding="gzip")
        assert headers["Content-Encoding"] == "gzip"
        assert json.loads(gzip.decompress(body))["runs"][0]["figures"]["step"] == 7
        assert ask(address, "/data", If_None_Match=headers["ETag"])[:2] == (304, b"")
        assert ask(address, "/", "HEAD")[:2] == (200, b"")
        assert ask(address, "/../run/config.yaml")[0] == 404
        assert ask(address, "/data", "POST")[0] == 501


def test_another_site_cannot_read_it_by_a_name_that_leads_here(tmp_path: Path) -> None:
    with served(write_run(tmp_path / "run")) as address:
        assert ask(address, "/data", Host="example.org")[0] == 403
        assert ask(address, "/data", Host=f"localhost:{address[1]}")[0] == 200


def test_the_data_change_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REFRESH_S", 0.0)
    monkeypatch.setattr(serve, "LOAD", 0.0)
    run = write_run(tmp_path / "run")
    with served(run) as address:
        tag = ask(address, "/data")[2]["ETag"]
        assert ask(address, "/data", If_None_Match=tag)[0] == 304
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(8, 9.0, 4, 3)) + "\n")
        status, body, headers = ask(address, "/data", If_None_Match=tag)
        assert status == 200
        assert headers["ETag"] != tag
        assert json.loads(body)["runs"][0]["figures"]["step"] == 8


def test_the_runs_are_read_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    whole = RunReader.read
    monkeypatch.setattr(RunReader, "read", lambda self: reads.append(1) or whole(self))
    monkeypatch.setattr(serve, "REFRESH_S", 600.0)
    content = serve.Content([RunReader(write_run(tmp_path / "run"))])
    threads = [threading.Thread(target=content.data) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1


def test_a_run_without_a_step_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REFRESH_S", 0.0)
    run = write_run(tmp_path / "run")
    steps = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")
    with served(run) as address:
        assert b"waits for the first step" in ask(address, "/")[1]
        (run / "metrics.jsonl").write_text(steps)
        assert b'id="data"' in ask(address, "/")[1]
