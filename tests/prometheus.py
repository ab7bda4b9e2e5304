"""A real Prometheus server for tests, which scrapes what a file of Ray names.

The program is the one on PATH, or the one that .ci/run unpacks in .cache/prometheus.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

UNPACKED = Path(__file__).resolve().parents[1] / ".cache" / "prometheus" / "usr" / "bin" / "prometheus"
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: ray
    file_sd_configs: [{{files: ['{targets}'], refresh_interval: 1s}}]
"""


def program() -> str | None:
    """Path of the program; None if it is not installed."""
    return shutil.which("prometheus") or (str(UNPACKED) if UNPACKED.exists() else None)


class Prometheus:
    """A server that listens at this address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each element of an instant query's answer."""
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"http://{self._address}/api/v1/query?{query}", timeout=30) as answer:
                found: dict[str, Any] = json.load(answer)
        except URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return []  # it starts
            raise
        return [(element["metric"], float(element["value"][1])) for element in found["data"]["result"]]

    def value(self, expression: str) -> float | None:
        """The only value of an answer; None if there is none."""
        found = self.ask(expression)
        assert len(found) <= 1, found
        return found[0][1] if found else None


@contextmanager
def prometheus(root: Path, targets: Path, port: int) -> Iterator[Prometheus]:
    """A server with its files in `root`, which scrapes what the file `targets` names."""
    (root / "prometheus.yml").write_text(CONFIG.format(targets=targets))
    address = f"127.0.0.1:{port}"
    options = {
        "config.file": root / "prometheus.yml",
        "storage.tsdb.path": root / "data",
        "web.listen-address": address,
    }
    command = [program() or "", *(f"--{name}={value}" for name, value in options.items())]
    with (root / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Prometheus(address)
        finally:
            process.kill()
            process.wait()
