"""A head that falls silent makes the coordinator ask for checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from elastic_moe.actors.node_watcher import AWAY, NodeWatcher
from tests.patience import until


def test_checkpoints_are_asked_for_while_the_head_is_silent() -> None:
    answers, asked, tries = threading.Event(), list[dict[str, Any]](), list[int]()
    answers.set()

    def list_nodes() -> tuple[Mapping[str, int], Iterable[str]]:
        assert answers.wait(60), "a question to a dead head hangs"
        return {}, ["a"]

    def submit(event: dict[str, Any]) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("busy")
        asked.append(event)

    watcher = NodeWatcher(submit, 30.0, list_nodes, interval_s=0.01, head_away_s=0.3)
    watcher.start()
    try:
        answers.clear()
        until(lambda: len(asked) == 3, "checkpoints, although the first try failed", 60.0)
        assert asked == [{"event": "checkpoint", "reason": AWAY}] * 3
    finally:
        answers.set()
        watcher.close()
