"""Makes Ray's notices about a death short: the run handles a death, and a thousand characters hide its own lines.

Ray prints errors of its cluster on the driver's standard output, through a `LogDeduplicator` that may rewrite or hold
back lines (ray/_private/ray_logging, `print_to_stdstream` of ray/_private/worker.py). Here one of those rewrites three
notices, which begin with a known sentence. Everything else is printed as it is, also a notice of another form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import worker
from ray._private.ray_logging import LogDeduplicator

WORKER_DIED = re.compile(
    r"A worker died or was killed while executing a task by an unexpected system error\..*?"
    r"Worker IP address: (?P<host>\S+).*?Worker PID: (?P<pid>\d+).*?Worker exit type: (?P<kind>\S+)"
    r" Worker exit detail: (?P<detail>.*?)\.?(?= Some common causes| There are some potential|$)",
    re.DOTALL,
)
NODE_DIED = re.compile(
    r"The node with node id: (?P<node>[0-9a-f]{8})[0-9a-f]* and address: (?P<host>\S+) .*?"
    r"has been marked dead because the detector has missed too many heartbeats from it\.",
    re.DOTALL,
)
RAYLET_DIED = re.compile(r"Raylet is terminated\. Termination is unexpected\.")  # with 20 lines of its log

_RAY: Any = worker  # what it imports is not exported


def short(notice: str) -> str:
    """A notice about a death in one line; "" if it is none."""
    if found := WORKER_DIED.match(notice):
        return "Ray: process {pid} on {host} died ({kind}: {detail})".format(**found.groupdict())
    if found := NODE_DIED.match(notice):
        return "Ray: node {node} at {host} does not answer any more, and counts as dead".format(**found.groupdict())
    if RAYLET_DIED.match(notice):
        return "Ray: the raylet of a node ended unexpectedly; its log is on that node"
    return ""


class _Shortening(LogDeduplicator):
    """Gives what is left to `stock`."""

    def __init__(self, stock: LogDeduplicator, tell: Callable[[str], object]) -> None:
        self._stock, self._tell = stock, tell

    def deduplicate(self, batch: Any) -> list[Any]:
        left: list[str] = []
        for line in batch["lines"]:
            if told := short(line):
                self._tell(told)
            else:
                left.append(line)
        return self._stock.deduplicate(batch | {"lines": left}) if left else []

    def flush(self) -> list[dict[str, Any]]:
        return self._stock.flush()


@contextmanager
def shortened(tell: Callable[[str], object]) -> Iterator[None]:
    """While this lasts, notices of this driver's Ray about a death are one line each.

    Args:
        tell: takes the line; a thread of Ray calls it.
    """
    stock = _RAY.stdout_deduplicator
    _RAY.stdout_deduplicator = _Shortening(stock, tell)
    try:
        yield
    finally:
        _RAY.stdout_deduplicator = stock
