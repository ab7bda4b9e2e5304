"""What stands in a checkpoint directory in place of a file: it is passed over, nothing hangs or fills memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.checkpoint import identity, storage
from elastic_moe.checkpoint.manifest import MANIFEST, _checksum
from elastic_moe.checkpoint.reader import find_latest, newest_manifest, verify_shards
from elastic_moe.checkpoint.storage import MAX_WHOLE, CorruptCheckpoint, Storage, StorageUnavailable
from elastic_moe.cli.checkpoint import main
from elastic_moe.run_dir import RUN, step_dir
from tests.unit.checkpoint.test_mutations import save


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_WHOLE + 1)


ODD = {"directory": Path.mkdir, "pipe": pipe, "device": endless, "link to itself": loop, "file of holes": holes}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Checkpoints of steps 10 and 20; a call that hangs in one of them is soon left behind."""
    monkeypatch.setattr(storage, "TIMEOUT_S", 20.0)
    for step in (10, 20):
        save(tmp_path, step)
    threads = set(threading.enumerate())
    yield tmp_path
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name == "storage"], "a call hangs"


def replace(path: Path, odd: str) -> None:
    path.unlink(missing_ok=True)
    ODD[odd](path)


@pytest.mark.parametrize("odd", ODD)
def test_a_manifest_that_is_no_file_is_damage_and_the_older_checkpoint_counts(root: Path, odd: str) -> None:
    replace(root / step_dir(20) / MANIFEST, odd)
    found = find_latest(str(root))
    assert found is not None
    assert found.step == 10


@pytest.mark.parametrize("odd", ODD)
def test_a_shard_that_is_no_file_is_damage(root: Path, odd: str) -> None:
    """Also where sizes were not compared before, as in a run that goes back."""
    manifest = newest_manifest(str(root))
    assert manifest is not None
    replace(root / step_dir(20) / manifest.shards[0].file, odd)
    with pytest.raises(CorruptCheckpoint):
        verify_shards(manifest)


@pytest.mark.parametrize("odd", ODD)
def test_an_identity_that_is_no_file_is_made_again_from_the_manifests(root: Path, odd: str) -> None:
    replace(root / RUN, odd)
    found = find_latest(str(root))
    assert found is not None
    assert found.step == 20


def test_what_cannot_be_looked_at_is_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> bool:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(storage, "is_regular", fail)
    with pytest.raises(StorageUnavailable):
        find_latest(str(root))


def test_an_identity_with_numbers_out_of_range_is_damaged(root: Path) -> None:
    body = json.loads(identity.RunIdentity("x").to_bytes()) | {"first_checkpoint": float("inf")}
    body.pop("sha256")
    (root / RUN).write_text(json.dumps(body | {"sha256": identity._checksum(body)}))
    with pytest.raises(CorruptCheckpoint):
        identity.read_identity(Storage(str(root)))


META: dict[str, dict[str, Any]] = {
    "a time of no year": {"time": 1e300},
    "no time": {"time": float("nan")},
    "keys that are a number": {"fingerprint": {"keys": 3}},
    "a text as fingerprint": {"fingerprint": "ab"},
    "a list as fingerprint": {"fingerprint": [["a", 1]]},
    "a character that cannot be encoded": {"run": "\ud800"},
}


def _reseal(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((directory / MANIFEST).read_bytes())
    body.pop("sha256")
    change(body)
    (directory / MANIFEST).write_text(json.dumps(body | {"sha256": _checksum(body)}))


@pytest.mark.parametrize("name", META)
def test_the_command_shows_any_manifest_or_tells_in_a_sentence(
    root: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    _reseal(root / step_dir(20), lambda body: body["meta"].update(META[name]))
    assert main(["list", str(root)]) == 0
    assert main(["verify", str(root)]) in (0, 1)
    assert main(["diff", str(root / step_dir(10)), str(root / step_dir(20))]) in (0, 2)
    assert "Traceback" not in capfd.readouterr().err


def test_a_step_beyond_all_counts_is_damage(root: Path) -> None:
    far = 10**30
    _reseal(root / step_dir(20), lambda body: body.update(step=far))
    (root / step_dir(20)).rename(root / step_dir(far))
    found = newest_manifest(str(root))
    assert found is not None
    assert found.step == 10
