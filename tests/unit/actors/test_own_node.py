"""The Ray nodes of this machine are read from the command lines of raylets, and a drain is bounded."""

from __future__ import annotations

import socket
import time

import pytest

from elastic_moe.actors.own_node import OwnNodes, node_of
from elastic_moe.notices.answers import Notice
from elastic_moe.notices.watch import RayNode

RAYLET = ["/venv/ray/core/src/ray/raylet/raylet", "--node_id=ab12", "--gcs-address=10.0.0.1:6379", "--labels={}"]


def test_a_raylet_names_its_node_and_its_cluster() -> None:
    assert node_of(RAYLET) == RayNode("ab12", "10.0.0.1:6379")


@pytest.mark.parametrize(
    "command",
    [[], ["python", "raylet"], ["ray::IDLE"], RAYLET[:2], ["/usr/bin/python", *RAYLET[1:]]],
)
def test_other_processes_are_no_nodes(command: list[str]) -> None:
    assert node_of(command) is None


def test_a_cluster_that_does_not_answer_is_told_within_the_bound() -> None:
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        node = RayNode("ab" * 28, f"127.0.0.1:{silent.getsockname()[1]}")
        began_s = time.monotonic()
        why = OwnNodes().drain(node, Notice("taken", time.time() + 60), 3.0)
        assert "did not answer within 3 s" in why
        assert time.monotonic() - began_s < 30.0
