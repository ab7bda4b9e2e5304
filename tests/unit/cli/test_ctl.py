"""Whom and what `elastic-moe ctl` means, and its sentences where it cannot."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from elastic_moe.actors import operate
from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.cli import ctl, status
from elastic_moe.errors import UserError

NODE, OTHER = "1f" * 28, "2e" * 28
STATUS = {"members": [["aa11", NODE, 1, False], ["ab22", NODE, 2, False], ["cc33", OTHER, 3, False]]}
HOSTS = {NODE: ("first", "10.0.0.1"), OTHER: ("second", "10.0.0.2")}


@pytest.mark.parametrize(
    ("who", "request_", "members"),
    [
        ("2", {"worker": "cc33"}, {"cc33"}),
        ("ab", {"worker": "ab22"}, {"ab22"}),
        ("1f1f", {"node": NODE}, {"aa11", "ab22"}),
        ("second", {"node": OTHER}, {"cc33"}),
        ("10.0.0.1", {"node": NODE}, {"aa11", "ab22"}),
    ],
)
def test_a_member_is_named_by_rank_id_or_node(who: str, request_: dict[str, str], members: set[str]) -> None:
    assert ctl.members_of(who, STATUS, HOSTS) == (request_, members)


@pytest.mark.parametrize(
    ("who", "what"), [("a", "several"), ("7", "no"), ("third", "no"), ("", "no"), ("²", "no"), ("-1", "no")]
)
def test_a_name_of_nobody_or_of_several_is_refused_with_those_there_are(who: str, what: str) -> None:
    with pytest.raises(UserError, match=f"names {what} members.*0: worker aa11 on node 1f1f1f1f"):
        ctl.members_of(who, STATUS, HOSTS)


def test_no_run_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert ctl.main([str(tmp_path), "pause"]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_a_cluster_that_has_ended_is_a_sentence_within_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    write_identity(Storage(str(tmp_path)), RunIdentity.new(str(tmp_path)))
    (tmp_path / "live.json").write_text(json.dumps({"ray": address}))
    assert ctl.main([str(tmp_path), "pause"]) == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_no_time_to_wait_is_a_sentence(seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path)
    assert ctl.main([run, "--wait", seconds, "pause"]) == 2
    assert ctl.main([run, "drain", "1", "--deadline", seconds]) == 2
    assert status.main([run, "--watch", "--every", seconds]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(" must be a number of seconds above 0")[0] for line in told] == [
        "--wait",
        "--deadline",
        "--every",
    ]


@pytest.mark.parametrize(
    "left", [b"", b"{", b"[1]", b'{"ray": 5}', b'{"ray": "10.0.0.1:99999999"}', b"\xff\xfe", b"[" * 99999]
)
def test_a_damaged_note_of_where_the_run_goes_on_is_a_sentence(
    left: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(operate.ray, "init", _no_cluster)
    (tmp_path / "live.json").write_bytes(left)
    assert ctl.main([str(tmp_path), "pause"]) == 2
    assert "no Ray cluster answers" in capsys.readouterr().err


def _no_cluster(**_: object) -> None:
    raise ConnectionError
