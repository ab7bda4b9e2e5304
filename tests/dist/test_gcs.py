"""Checkpoints and runs on a Google Cloud Storage server: an emulator in a process of its own."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.checkpoint.reader import find_latest, load_manifest
from elastic_moe.checkpoint.storage import Storage, StorageUnavailable, persistent, probe, set_timeout
from elastic_moe.checkpoint.writer import list_steps, retain
from elastic_moe.cli.checkpoint import main
from elastic_moe.environment import environment
from elastic_moe.errors import UserError
from elastic_moe.run_dir import step_dir
from tests.dist.test_s3 import MIB, assert_newest, save, settle
from tests.dist.test_s3_lease import assert_one_of_several_owns
from tests.dist.test_s3_run import STEPS, config_of, saw
from tests.gcs_server import BUCKET, GcsServer, gcs_server, variables
from tests.local_run import LocalRun
from tests.s3_server import WRITES, Fault, faulty_proxy

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    with gcs_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def root(server: GcsServer) -> Iterator[str]:
    """A checkpoint root of the test's own."""
    with environment(server.variables):
        set_timeout(6.0)
        yield f"gs://anonymous@{BUCKET}/{uuid.uuid4().hex}/checkpoints"
        server.process.send_signal(signal.SIGCONT)
        set_timeout(60.0)


def test_save_list_verify_resume_and_retain(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    probe(root)
    for step in (10, 20, 30):
        save(root, step)
    storage = Storage(root)
    assert list_steps(storage) == [10, 20, 30]
    assert storage.directories() == [step_dir(step) for step in (10, 20, 30)]
    assert_newest(root, 30)
    assert retain(root, 2) == [10]
    assert list_steps(storage) == [20, 30]
    assert not storage.entries(step_dir(10))
    assert {entry.is_directory for entry in storage.entries("")} == {True}
    storage.write(f"{step_dir(30)}/{load_manifest(root, 30).shards[0].file}", bytes(9))
    assert_newest(root, 20)
    assert main(["verify", root]) == 1
    assert main(["prune", root]) == 0
    capsys.readouterr()
    assert main(["list", root]) == 0
    assert capsys.readouterr().out


def test_files_and_directories_of_one_directory(root: str) -> None:
    storage = Storage(root)
    for name in ("a/b/c", "a/b2", "a/d/e/f", "ab/g", "h"):
        storage.write(name, name.encode())
    assert storage.directories() == ["a", "ab"]
    assert [(entry.name, entry.is_directory) for entry in storage.entries("a")] == [
        ("b", True),
        ("b2", False),
        ("d", True),
    ]
    assert storage.sizes("a") == {"b2": 4}
    storage.remove_directory("a")
    assert storage.directories() == ["ab"]
    with pytest.raises(FileNotFoundError):
        storage.read("a/b2")
    storage._fs.create_dir(storage.path("ab"))  # some clients write an object for a directory
    assert storage.directories() == ["ab"]
    storage.remove_directory("ab")
    assert not storage.directories()


def test_what_cannot_be_read_is_never_absent_and_nothing_is_deleted(root: str, server: GcsServer) -> None:
    for step in (10, 20):
        save(root, step)
    Storage(root).write("small", b"as it was")
    server.process.send_signal(signal.SIGSTOP)
    actions: list[Callable[[], object]] = [
        lambda: find_latest(root),
        lambda: load_manifest(root, 20),
        lambda: retain(root, 1),
        lambda: persistent(lambda: Storage(root).write("small", b"something else"), attempts=1),
    ]
    for action in actions:
        with pytest.raises(StorageUnavailable, match=r"did not answer for 6 s|has not returned yet"):
            action()
    with pytest.raises(UserError, match="cannot be written, so nothing could be saved: ") as caught:
        probe(root)
    assert "\n" not in str(caught.value)
    server.process.send_signal(signal.SIGCONT)
    settle(root)
    assert list_steps(Storage(root)) == [10, 20]
    assert_newest(root, 20)
    assert Storage(root).read("small") in (b"as it was", b"something else"), "a call that was left behind goes on"


@pytest.mark.parametrize("kind", ["500", "403", "cut upload"])
def test_a_failed_upload_publishes_nothing(root: str, server: GcsServer, kind: str) -> None:
    """Through the proxy of the tests on S3. It is a thread here, so nothing may be read in parts (see `read_into`)."""
    with faulty_proxy(server.port) as proxy, environment(variables(proxy.server_port)):
        storage = Storage(root + "/proxied")
        storage.write("small", b"as it was")
        proxy.fault = Fault(kind, WRITES)
        with pytest.raises((OSError, TimeoutError)):
            storage.write_pieces("large", [memoryview(bytes(24 * MIB))])
        with pytest.raises((OSError, TimeoutError)):
            storage.write("small", b"something else")
        assert proxy.hits
        proxy.fault = Fault()
        settle(root + "/proxied")
        assert storage.size("large") == -1
        assert storage.read("small") == b"as it was"


def test_the_probe_of_a_bucket_that_is_not_there_is_one_sentence(root: str) -> None:
    with pytest.raises(UserError, match="cannot be written, so nothing could be saved: ") as caught:
        probe("gs://anonymous@another-bucket/a")
    assert "\n" not in str(caught.value)


def test_one_of_several_processes_owns_the_root(root: str) -> None:
    assert_one_of_several_owns(root)


def test_a_run_is_killed_and_resumed(tmp_path: Path, root: str) -> None:
    with LocalRun(config_of(tmp_path / "undisturbed", "", STEPS), 2) as run:
        run.wait_end()
        expected = run.losses()
    with LocalRun(config_of(tmp_path / "run", root, 1000), 2) as run:
        run.wait("a checkpoint", lambda _: saw(run, "checkpoint"))
        for worker in list(run.processes):
            run.signal(worker, signal.SIGKILL)
    found = find_latest(root)
    assert found is not None
    config = config_of(tmp_path / "run", root, found.step + STEPS)
    config = replace(config, checkpoint=replace(config.checkpoint, keep=2))
    with LocalRun(config, 2) as run:
        run.wait_end()
        losses = run.losses()
        entered = [(e["source"], e["step"]) for e in run.events() if e["event"] == "entered"]
    assert entered == [("initialisation", 0), ("checkpoint", found.step)]
    assert len(losses) == found.step + STEPS
    assert losses[:STEPS] == expected, "bit for bit"
    steps = list_steps(Storage(root))
    assert len(steps) == 2, "older ones are deleted"
    assert steps[-1] == found.step + STEPS
