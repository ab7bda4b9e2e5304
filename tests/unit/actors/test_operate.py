"""Which cluster an operator's command asks about a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_moe.actors import operate
from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.errors import UserError
from elastic_moe.run_dir import LIVE


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were asked; none of them answers."""
    addresses: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(operate, "unreachable", lambda address: addresses.append(address) or "refused")
    return addresses


def a_run(root: Path) -> None:
    write_identity(Storage(str(root)), RunIdentity.new(str(root)))


def test_no_other_cluster_is_asked_about_a_run_that_has_ended(tmp_path: Path, asked: list[str]) -> None:
    a_run(tmp_path)
    with pytest.raises(UserError, match=r"no run in .* goes on"), operate.live_run(tmp_path):
        pass
    assert not asked


@pytest.mark.parametrize("where", ["option", "environment", "live.json"])
def test_a_named_cluster_is_asked(
    tmp_path: Path, asked: list[str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path)
    address = "10.0.0.1:6379"
    if where == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    if where == "live.json":
        (tmp_path / LIVE).write_text(json.dumps({"ray": address}))
    with (
        pytest.raises(UserError, match=f"at {address} "),
        operate.live_run(tmp_path, address if where == "option" else ""),
    ):
        pass
    assert asked == [address]


def test_a_directory_that_is_not_here_may_be_a_runs_elsewhere(tmp_path: Path, asked: list[str]) -> None:
    with pytest.raises(UserError, match="not the directory of a run on this machine"), operate.live_run(tmp_path):
        pass
    assert asked == ["auto"]
