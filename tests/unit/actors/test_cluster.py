"""Which cluster a run takes where none is chosen."""

from __future__ import annotations

import socket

import pytest

from elastic_moe.actors.cluster import ray_session, resolve, unreachable
from elastic_moe.config.schema import ClusterConfig, TrainConfig
from elastic_moe.errors import UserError


@pytest.mark.parametrize(
    ("given", "variable", "kind", "address"),
    [
        ({}, None, "local", ""),
        ({}, "local", "local", ""),
        ({}, "10.0.0.1:6379", "address", "10.0.0.1:6379"),
        ({}, "auto", "address", "auto"),
        ({"address": "10.0.0.2:6379"}, "10.0.0.1:6379", "address", "10.0.0.2:6379"),
        ({"kind": "local"}, "10.0.0.1:6379", "local", ""),
        ({"kind": "simulated"}, "10.0.0.1:6379", "simulated", ""),
        ({"kind": "address"}, None, "address", ""),
    ],
)
def test_the_cluster_that_is_named_else_an_embedded_one(
    given: dict[str, str], variable: str | None, kind: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    cluster = resolve(TrainConfig(cluster=ClusterConfig(**given))).cluster  # type: ignore[arg-type]
    assert (cluster.kind, cluster.address) == (kind, address)


def test_a_wrong_address_is_a_sentence_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert unreachable(address), "nobody listens yet"
        free.listen()
        assert unreachable(address) == ""
    assert unreachable("auto") == ""
    config = TrainConfig(cluster=ClusterConfig(kind="address", address=address))
    with pytest.raises(UserError, match=f"no Ray cluster answers at {address}"), ray_session(config):
        pass
