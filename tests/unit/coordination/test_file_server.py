"""The coordinator's file server and the file system that reads and writes there: what is served, to whom, and whole."""

from __future__ import annotations

import errno
import http.client
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from elastic_moe.checkpoint import served, storage
from elastic_moe.checkpoint.reader import newest_manifest, verify_shards
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, StorageUnavailable
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.coordination import file_server, incoming
from elastic_moe.coordination.file_server import MAX_STRANGERS, FileServer, Place
from elastic_moe.coordination.incoming import HEAD_BYTES, Incoming
from elastic_moe.errors import UserError
from elastic_moe.runtime import places
from tests.many_files import many_files

TOKEN = "secret"
ROOT = "run://checkpoints"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """A server of two places; a test may change the address, as a new coordinator does."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "secret.txt").write_text("not served")
    places = {"checkpoints": Place(str(tmp_path / "root"), writable=True), "corpus": Place(str(tmp_path / "corpus"))}
    server = FileServer("127.0.0.1", TOKEN, places)
    now = [server.start()]
    monkeypatch.setattr(served, "PATIENCE_S", 5.0)
    monkeypatch.setattr(served, "_source", [(lambda: now[0] if now else None, TOKEN)])
    storage.open_filesystem.cache_clear()
    storage._for_one_request.cache_clear()
    yield now
    server.close()
    storage.open_filesystem.cache_clear()
    storage._for_one_request.cache_clear()


def ask(
    address: tuple[str, int], path: str, token: str = TOKEN, method: str = "GET", **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request(method, path, headers={"Authorization": f"Bearer {token}", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def test_a_checkpoint_is_written_and_read_through_it(address: list[tuple[str, int]], tmp_path: Path) -> None:
    tensors = {"a/weight": torch.randn(3000), "b/weight": torch.randn(5), "b/m": torch.randn(5)}
    shard = write_shard(ROOT, 20, "r0", tensors)
    manifest = write_manifest(str(tmp_path / "root"), 20, [shard], {})
    assert load((tmp_path / "root" / manifest.directory / shard.file).read_bytes()).keys() == tensors.keys()
    found = newest_manifest(ROOT)
    assert found is not None
    assert found.to_bytes() == manifest.to_bytes()
    verify_shards(found)
    units = read_units(found, ["b"])
    assert torch.equal(units["b"]["m"], tensors["b/m"])


def test_what_is_not_there_or_damaged_is_told_as_by_any_storage(address: list[tuple[str, int]], tmp_path: Path) -> None:
    far = Storage(ROOT)
    assert far.directories() == []
    assert far.size("nothing") == -1
    assert newest_manifest(ROOT) is None
    with pytest.raises(FileNotFoundError):
        far.read("nothing")
    far.write("some", b"12345")
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        far.read_into("some", [(3, memoryview(bytearray(4)))])
    far.write("some", b"")
    assert far.read("some") == b""
    os.mkfifo(tmp_path / "root" / "pipe")
    with pytest.raises(OSError, match="pipe"):
        far.read("pipe")


def test_large_files_and_many_at_once_are_whole(address: list[tuple[str, int]], tmp_path: Path) -> None:
    content = os.urandom(20 << 20)
    writers = [threading.Thread(target=lambda i=i: Storage(ROOT).write(f"d/{i}", content[i:])) for i in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for i in range(6):
        assert (tmp_path / "root" / "d" / str(i)).read_bytes() == content[i:]
    assert Storage(ROOT).read("d/3") == content[3:]
    assert Storage(ROOT).sizes("d") == {str(i): len(content) - i for i in range(6)}


@pytest.mark.parametrize(
    "path",
    [
        "/checkpoints/../secret.txt",
        "/checkpoints/%2e%2e/secret.txt",
        "/checkpoints/..%2fsecret.txt",
        "/corpus/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/corpus//etc/passwd",
        "/unknown/x",
        "/corpus/a%00b",
        "/",
    ],
)
def test_no_name_leads_out_of_the_served_directories(address: list[tuple[str, int]], path: str) -> None:
    for query in ("", "?info", "?list"):
        status, content = ask(address[0], path + query)
        assert status == 404
        assert content == b"no such file"


def test_workers_write_checkpoints_only(address: list[tuple[str, int]], tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="workers do not write there"):
        storage.persistent(lambda: Storage("run://corpus").write("train.bin", b"changed"), pause_s=0.01)
    assert (tmp_path / "corpus" / "train.bin").stat().st_size == 25_600
    assert ask(address[0], "/checkpoints/x", method="DELETE")[0] == 501


def test_the_token_is_asked_for(address: list[tuple[str, int]], tmp_path: Path) -> None:
    for token in ("wrong", "", "sécret"):
        assert ask(address[0], "/corpus/train.bin", token)[0] == 401
    status, _ = ask(address[0], "/checkpoints/x", "wrong", "PUT", **{"Transfer-Encoding": "chunked"})
    assert status == 401
    assert not (tmp_path / "root").exists()


def test_a_write_that_breaks_off_is_not_published(address: list[tuple[str, int]], tmp_path: Path) -> None:
    Storage(ROOT).write("some", b"before")
    for end in (b"", b"5\r\nab", b"zz\r\n", b"-4\r\nabcd\r\n"):
        with socket.create_connection(address[0], 20) as peer:
            head = (
                f"PUT /checkpoints/some HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            peer.sendall(head.encode() + b"3\r\nabc\r\n" + end)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass
    assert (tmp_path / "root" / "some").read_bytes() == b"before"
    assert os.listdir(tmp_path / "root") == ["some"], "no temporary file is left"


def test_a_full_disk_is_told_by_its_name_while_the_file_still_comes(
    address: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, parts: Iterator[memoryview], activity: object) -> None:
        next(parts)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_server, "write_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        Storage(ROOT).write("big", bytes(64 << 20))
    assert caught.value.errno == errno.ENOSPC


def test_a_coordinator_that_was_started_again_is_found(address: list[tuple[str, int]], tmp_path: Path) -> None:
    """Its server is away for a while, and then at another address, under reads that go on."""
    far = Storage("run://corpus")
    assert far.size("train.bin") == 25_600
    old = address[0]
    address[0] = ("127.0.0.1", _free_port())
    second = FileServer("127.0.0.1", TOKEN, {"corpus": Place(str(tmp_path / "corpus"))})

    def come_back() -> None:
        time.sleep(1.0)
        address[0] = second.start()

    threading.Thread(target=come_back).start()
    try:
        assert far.size("train.bin") == 25_600
        assert address[0] != old
    finally:
        second.close()


def test_strangers_do_not_keep_a_worker_out(address: list[tuple[str, int]]) -> None:
    silent = [socket.create_connection(address[0], 20) for _ in range(MAX_STRANGERS + 20)]
    try:
        assert Storage("run://corpus").size("train.bin") == 25_600
    finally:
        for each in silent:
            each.close()


def test_a_stranger_has_few_bytes_and_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    sender = threading.Thread(target=lambda: there.sendall(bytes(HEAD_BYTES + 100)))
    sender.start()
    incoming_bytes = Incoming(here)
    lines = io.BufferedReader(incoming_bytes)
    assert len(lines.read()) == HEAD_BYTES
    incoming_bytes.known = True
    assert len(lines.read(100)) == 100, "the rest was not read before"
    sender.join()

    monkeypatch.setattr(incoming, "HELLO_TIMEOUT_S", 0.5)
    slow, ended = io.BufferedReader(Incoming(here)), threading.Event()

    def drip() -> None:
        while not ended.wait(0.02):
            there.send(b"a")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert len(slow.read()) < HEAD_BYTES
    finally:
        ended.set()
        dripping.join()
        here.close()
        there.close()


def test_a_disk_that_fails_midway_adds_nothing_to_a_file(
    address: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer has begun, so a second one would be taken for bytes of the file."""

    def fails(self: socket.socket, file: object, offset: int, count: int) -> int:
        self.sendall(bytes(count - 40))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(socket.socket, "sendfile", fails)
    with pytest.raises(ConnectionError, match="25600 bytes, of which 25560 came"):
        Storage("run://corpus").read("train.bin")


FOUND = b'{"name": "x", "kind": "file", "size": 10, "changed_ns": 1}'


def answer(body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body) if length is None else length, body)


@pytest.mark.parametrize(
    ("info", "content"),
    [
        (answer(FOUND), answer(bytes(11))),
        (answer(FOUND), answer(bytes(9))),
        (answer(FOUND), answer(bytes(9), 10)),
        (answer(FOUND), b"HTTP/1.1 500 no\r\nX-Errno: many\r\n\r\n" + bytes(1 << 20)),
        (answer(FOUND), b"nonsense\r\n\r\n"),
        (answer(FOUND.replace(b"10", b"-10")), b""),
        (answer(FOUND.replace(b"10", b'"much"')), b""),
        (answer(FOUND.replace(b"10", b"1" + b"0" * 30)), b""),
        (answer(b"[" * 100_000), b""),
        (answer(b"[1]"), b""),
    ],
)
def test_a_server_that_lies_is_a_storage_that_fails(
    address: list[tuple[str, int]], info: bytes, content: bytes
) -> None:
    """Never a file of other bytes, another error, or more memory than was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address[0] = listening.getsockname()
        answers = iter([info, content])

        def serve() -> None:
            for each in answers:
                if not each:
                    return
                with listening.accept()[0] as peer, peer.makefile("rb") as lines:
                    while lines.readline().strip():
                        pass
                    peer.sendall(each)

        serving = threading.Thread(target=serve)
        serving.start()
        with pytest.raises(ConnectionError, match="x"):
            Storage("run://corpus").read("x")
        serving.join()


def test_a_worker_with_many_open_files_writes(address: list[tuple[str, int]], tmp_path: Path) -> None:
    with many_files():
        Storage(ROOT).write("some", b"12345")
    assert (tmp_path / "root" / "some").read_bytes() == b"12345"


def test_a_copied_model_is_that_of_now(address: list[tuple[str, int]], tmp_path: Path) -> None:
    """Weights that were trained further have their old names and sizes. A change under the copy is told."""
    weights = tmp_path / "model" / "weights"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    server = FileServer("127.0.0.1", TOKEN, {places.MODEL: Place(str(weights.parent))})
    address[0] = server.start()
    try:
        before = places._listing_digest(places.MODEL)
        assert places._listing_digest(places.MODEL) == before
        weights.write_bytes(b"new")
        os.utime(weights, ns=(1, 1))
        assert places._listing_digest(places.MODEL) != before
        with pytest.raises(UserError, match="changed on the coordinator's node"):
            places.fetch(places.MODEL, tmp_path / "copies" / "a", lambda _: places._check_unchanged(before))
        assert not (tmp_path / "copies" / "a").exists()
    finally:
        server.close()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
