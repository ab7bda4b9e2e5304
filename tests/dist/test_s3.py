"""Checkpoints on an S3 server in a process of its own, behind a proxy that fails as an object store fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.reader import find_latest, load_manifest
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, StorageUnavailable, probe
from elastic_moe.checkpoint.writer import list_steps, retain, write_manifest
from elastic_moe.cli.checkpoint import main
from elastic_moe.errors import UserError
from elastic_moe.run_dir import step_dir
from tests.s3_server import READS, WRITES, Fault, Proxy, endpoint

MIB = 1 << 20
pytestmark = pytest.mark.timeout(300)


def save(root: str, step: int, numbers: int = 1000) -> None:
    shards = [
        write_shard(root, step, name, {f"{name}/weight": torch.full((numbers,), float(step))}) for name in ("a", "b")
    ]
    write_manifest(root, step, shards)


def assert_newest(root: str, step: int) -> None:
    found = find_latest(root)
    assert found is not None
    assert found.step == step
    for unit in read_units(found, ["a", "b"]).values():
        assert (unit["weight"] == step).all()


def settle(root: str) -> None:
    """Wait until no call that was left behind hangs any more."""
    deadline_s = time.monotonic() + 120
    while True:
        try:
            Storage(root).size("")
            return
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def test_save_list_verify_resume_and_retain(root: str) -> None:
    probe(root)
    for step in (10, 20, 30):
        save(root, step)
    assert list_steps(Storage(root)) == [10, 20, 30]
    assert_newest(root, 30)
    assert retain(root, 2) == [10]
    assert list_steps(Storage(root)) == [20, 30]


def test_an_endpoint_in_the_uri_counts(root: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    given = f"{root}?endpoint_override={endpoint(proxy).removeprefix('http://')}&scheme=http"
    save(given, 10)
    save(given, 20)
    assert_newest(given, 20)
    path, _, query = given.partition("?")
    assert main(["diff", f"{path}/{step_dir(10)}?{query}", f"{path}/{step_dir(20)}?{query}"]) == 0


def test_the_newest_whole_one_is_picked(root: str) -> None:
    for step in (10, 20, 30):
        save(root, step)
    damaged = load_manifest(root, 30)
    Storage(root).write(f"{step_dir(30)}/{damaged.shards[0].file}", bytes(damaged.shards[0].bytes))
    assert_newest(root, 20)
    Storage(root).remove(f"{step_dir(20)}/{load_manifest(root, 20).shards[0].file}")
    assert_newest(root, 10)
    assert list_steps(Storage(root)) == [10, 20, 30], "nothing is deleted"


@pytest.mark.parametrize("kind", ["500", "503", "403", "cut download", "hang"])
def test_what_cannot_be_read_is_never_absent_and_nothing_is_deleted(root: str, proxy: Proxy, kind: str) -> None:
    for step in (10, 20):
        save(root, step)
    proxy.fault = Fault(kind, READS)
    for action in (lambda: find_latest(root), lambda: load_manifest(root, 20), lambda: retain(root, 1)):
        with pytest.raises(StorageUnavailable):
            action()
    assert proxy.hits
    proxy.fault = Fault()
    settle(root)
    assert list_steps(Storage(root)) == [10, 20]
    assert_newest(root, 20)


@pytest.mark.parametrize("kind", ["500", "403", "cut upload", "hang"])
@pytest.mark.parametrize("path", ["partNumber=2", "uploadId=", ""])
def test_a_failed_upload_publishes_nothing(root: str, proxy: Proxy, kind: str, path: str) -> None:
    storage, parts = Storage(root), [memoryview(bytes(24 * MIB))]
    storage.write("small", b"as it was")
    proxy.fault = Fault(kind, WRITES, path)
    with pytest.raises((OSError, TimeoutError)):
        storage.write_pieces("large", parts)
    if not path:
        with pytest.raises((OSError, TimeoutError)):
            storage.write("small", b"something else")
    assert proxy.hits
    proxy.fault = Fault()
    settle(root)
    whole = (parts[0].nbytes,) if kind == "hang" else ()  # a call that was left behind goes on to its end
    assert storage.size("large") in (-1, *whole), "a part of the object counts as the object"
    assert storage.read("small") in (b"as it was", *([b"something else"] if whole else []))


def test_a_cut_upload_leaves_no_checkpoint(root: str, proxy: Proxy) -> None:
    save(root, 10)
    proxy.fault = Fault("cut upload", WRITES, r"b-\w+\.safetensors")
    with pytest.raises(StorageUnavailable):
        save(root, 20)
    proxy.fault = Fault("cut upload", WRITES, "manifest")
    with pytest.raises(StorageUnavailable):
        save(root, 30)
    proxy.fault = Fault()
    assert_newest(root, 10)
    with pytest.raises(FileNotFoundError):
        load_manifest(root, 30)
    save(root, 20)
    assert_newest(root, 20)


def test_a_manifest_needs_its_shards(root: str) -> None:
    shards = [write_shard(root, 5, name, {f"{name}/weight": torch.ones(9)}) for name in ("a", "b")]
    Storage(root).remove(f"{step_dir(5)}/{shards[1].file}")
    with pytest.raises(CorruptCheckpoint, match="has -1 bytes"):
        write_manifest(root, 5, shards)


def test_a_slow_storage_is_waited_for(root: str, proxy: Proxy) -> None:
    proxy.fault = Fault("slow")
    save(root, 10)
    assert_newest(root, 10)


@pytest.mark.parametrize("kind", ["500", "403", "hang"])
def test_the_probe_is_one_sentence(root: str, proxy: Proxy, kind: str) -> None:
    proxy.fault = Fault(kind)
    with pytest.raises(UserError, match=r"cannot be written, so nothing could be saved: ") as caught:
        probe(root)
    assert "\n" not in str(caught.value)
    proxy.fault = Fault()
    settle(root)
    with pytest.raises(UserError, match="NO_SUCH_BUCKET"):
        probe("s3://another-bucket/a")


def test_the_command_line(root: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, 10)
    save(root, 20)
    write_shard(root, 30, "a", {"a/weight": torch.ones(9)})
    assert main(["list", root]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]][:2] == ["complete"] * 2
    assert main(["verify", root]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert main(["diff", f"{root}/{step_dir(10)}", f"{root}/{step_dir(20)}/"]) == 0
    assert "a: weight changed" in capsys.readouterr().out
    Storage(root).write(f"{step_dir(20)}/{load_manifest(root, 20).shards[0].file}", bytes(9))
    assert main(["verify", root]) == 1
    proxy.fault = Fault("403")
    for command in (["list", root], ["verify", root], ["prune", root]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "ACCESS_DENIED" in error
        assert len(error.splitlines()) == 1


def test_a_command_on_a_storage_that_hangs_ends(root: str, proxy: Proxy, tmp_path: Path) -> None:
    save(root, 10)
    proxy.fault = Fault("hang")
    program = (
        "import sys; from elastic_moe.checkpoint import storage, bounded; storage.set_timeout(3.0);"
        f"from elastic_moe.cli.checkpoint import main; sys.exit(main(['list', {root!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert storage_module.TIMEOUT_S == 6.0
