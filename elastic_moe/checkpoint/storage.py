"""Storage of checkpoints: a directory or an object store behind one small interface, built on `pyarrow.fs`.

A local file is written under a temporary name, synced to disk and then renamed, so its name never shows a partial file.
In an object store, a put is atomic by itself. Storage can fail for a short time, so an operation is tried several times
before its error is raised. It can also hang, so every operation runs in a thread that is left behind after a time-out.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from elastic_moe.checkpoint.bounded import Activity, bounded
from elastic_moe.checkpoint.local_file import PIECE, in_pieces, is_regular, write_file
from elastic_moe.checkpoint.served import SCHEME, served_filesystem
from elastic_moe.errors import UserError

ATTEMPTS = 3
PAUSE_S = 0.2
TIMEOUT_S = 60.0  # set by `set_timeout`: an operation that does not get on by one piece within this is left behind
MAX_WHOLE = 1 << 28  # bytes of a manifest or an identity; those of 1,000 ranks and 20,000 units have a few million
_READ_BYTES = 1 << 20  # of a file that is read whole
_FLUSH_BYTES = 1 << 25  # of an object are copied and on their way at once
_PUT_BYTES = 4 << 20  # a smaller object is written by one request
_S3_REQUESTS = 6  # requests without an answer that fit into the time-out; the client tries each one three times
T = TypeVar("T")


class CorruptCheckpoint(OSError):
    """A file of a checkpoint differs from its manifest: missing, truncated or changed."""


class StorageUnavailable(OSError):
    """The storage failed for another reason than absence or damage, at every attempt.

    It tells nothing about the checkpoints: they may be there and whole. So it never means that there are none.
    """


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file or directory.

    Attributes:
        name: without the directory that it lies in.
        is_directory: it is a directory.
        changed_s: when it was last changed, by the storage's clock, in seconds since the Unix epoch; 0 if not known.
    """

    name: str
    is_directory: bool
    changed_s: float


class Storage:
    """One checkpoint root. Every method is bounded in time.

    Args:
        root_uri: a path, a URI that pyarrow knows (file://, s3://, gs://, hdfs://), or run:// (`served.py`).
        activity: told of the bytes that are read and written, where the operations are part of a longer call.

    Raises:
        UserError: the URI's scheme is unknown.
        StorageUnavailable: the object store cannot be reached.
    """

    def __init__(self, root_uri: str, activity: Activity | None = None) -> None:
        self._place, self._activity = root_uri, activity
        try:
            self._fs, self._root = persistent(lambda: self._bounded(lambda _: open_filesystem(root_uri)))
        except ValueError as error:
            raise UserError(
                f"checkpoint.dir={root_uri} cannot be used ({error}); give a path, s3:// or gs:// URI"
            ) from error
        self._local = isinstance(self._fs, pafs.LocalFileSystem)
        self._flat = isinstance(self._fs, pafs.GcsFileSystem)

    def path(self, name: str) -> str:
        """Full path of a name relative to the root."""
        return f"{self._root}/{name}" if name else self._root

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file atomically, replacing one of that name."""
        self.write_pieces(name, [memoryview(data)])

    def write_pieces(self, name: str, parts: Sequence[memoryview]) -> None:
        """As `write`, with the file's bytes in parts, which are not copied."""
        path = self.path(name)
        if self._local:
            self._bounded(lambda activity: write_file(path, parts, activity))
        else:
            small = sum(map(len, parts)) < _PUT_BYTES
            filesystem = _for_one_request(self._place) if small else self._fs
            self._bounded(lambda activity: _write_object(filesystem, path, parts, activity))

    def read(self, name: str) -> bytes:
        """Read a whole file of at most `MAX_WHOLE` bytes.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpoint: it is larger, or no regular file.
        """
        path = self.path(name)

        def action(activity: Activity) -> bytes:
            if self._local and not is_regular(path):
                raise CorruptCheckpoint(f"{path} is no file")
            content = bytearray()
            with self._fs.open_input_stream(path) as stream:
                while piece := stream.read(_READ_BYTES):
                    content += piece
                    if len(content) > MAX_WHOLE:
                        raise CorruptCheckpoint(f"{path} has more than {MAX_WHOLE} bytes")
                    activity.moved(len(piece))
            return bytes(content)

        return self._bounded(action)

    def read_into(self, name: str, spans: Iterable[tuple[int, memoryview]]) -> None:
        """Read ranges of one file.

        Args:
            name: path relative to the root.
            spans: (offset in bytes, buffer to fill).

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpoint: the file ends before a range does.
        """

        def action(activity: Activity) -> None:
            path = self.path(name)
            if self._flat:  # the first request of a file keeps the interpreter from all threads: does the store answer?
                self._fs.get_file_info(path)
            with self._fs.open_input_file(path) as file:
                for offset, buffer in spans:
                    file.seek(offset)
                    for piece in in_pieces([buffer]):
                        if file.readinto(piece) != len(piece):
                            raise CorruptCheckpoint(f"{path} is truncated")
                        activity.moved(len(piece))

        self._bounded(action)

    def size(self, name: str) -> int:
        """Size of a file in bytes, or -1 if there is none."""
        info = self._bounded(lambda _: self._fs.get_file_info(self.path(name)))
        return info.size if info.type == pafs.FileType.File else -1

    def sizes(self, name: str) -> dict[str, int]:
        """Sizes in bytes of the files directly in a directory, by name; empty if there is none."""
        return {info.base_name: info.size for info in self._list(self.path(name)) if info.type == pafs.FileType.File}

    def sha256(self, name: str, size: int) -> str:
        """SHA-256 checksum of a file of so many bytes, which is read in pieces.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpoint: it has another size, or is no regular file.
        """
        path = self.path(name)

        def action(activity: Activity) -> str:
            if self._local and not is_regular(path):
                raise CorruptCheckpoint(f"{path} is no file")
            digest = hashlib.sha256()
            with self._fs.open_input_stream(path) as stream:
                found = self._fs.get_file_info(path).size
                if found == size:
                    found, buffer = 0, memoryview(bytearray(max(1, min(PIECE, size))))
                    while count := stream.readinto(buffer):
                        digest.update(buffer[:count])
                        found += count
                        activity.moved(count)
            if found != size:
                raise CorruptCheckpoint(f"{path} has {found} bytes, not {size}")
            return digest.hexdigest()

        return self._bounded(action)

    def directories(self) -> list[str]:
        """Names of the directories directly below the root; an empty list if the root does not exist."""
        infos = self._list(self._root)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def entries(self, directory: str) -> list[FileEntry]:
        """Everything directly in a directory below the root, by name; an empty list if it does not exist."""
        infos = self._list(self.path(directory))
        found = [FileEntry(i.base_name, i.type == pafs.FileType.Directory, (i.mtime_ns or 0) / 1e9) for i in infos]
        return sorted(found, key=lambda entry: entry.name)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.size(name) >= 0:
            self._bounded(lambda _: self._fs.delete_file(self.path(name)))

    def remove_directory(self, name: str) -> None:
        """Delete a directory with its content."""
        path = self.path(name)
        try:
            self._bounded(lambda _: self._fs.delete_dir(path))
        except FileNotFoundError:  # of Google's, in the end: the directory itself has no object (see `_direct`)
            if not self._flat or self._list(path):
                raise

    def _list(self, path: str) -> list[pafs.FileInfo]:
        """What lies directly in a directory, in no order; an empty list if it does not exist."""
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=self._flat)
        infos: list[pafs.FileInfo] = self._bounded(lambda _: self._fs.get_file_info(selector))
        return _direct(infos, path) if self._flat else infos

    def _bounded(self, action: Callable[[Activity], T]) -> T:
        return bounded(self._place, action, TIMEOUT_S, self._activity)


def _direct(infos: Iterable[pafs.FileInfo], path: str) -> list[pafs.FileInfo]:
    """What lies directly in a directory, of all that lies below it.

    Google's store has no directories. Asked for what lies directly in one, pyarrow leaves out those that have no object
    of their own (https://github.com/apache/arrow/issues/35993): all that are but part of the names of files.
    """
    found: dict[str, pafs.FileInfo] = {}
    for info in infos:
        name, is_deeper, _ = info.path.removeprefix(f"{path}/").partition("/")
        found[name] = pafs.FileInfo(f"{path}/{name}", pafs.FileType.Directory) if is_deeper else info
    return list(found.values())


def probe(root_uri: str) -> None:
    """Write a small file of our own below a root, read it back and delete it.

    Raises:
        UserError: one of these fails, so no checkpoint could be saved there.
    """
    name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        storage = Storage(root_uri)
        persistent(lambda: storage.write(name, content))
        read = persistent(lambda: storage.read(name))
        persistent(lambda: storage.remove(name))
    except OSError as error:
        raise UserError(f"checkpoint.dir={root_uri} cannot be written, so nothing could be saved: {error}") from error
    if read != content:
        raise UserError(f"checkpoint.dir={root_uri} does not give back what is written there.")


def set_timeout(timeout_s: float) -> None:
    """Set `checkpoint.timeout_s` for all storage that this process opens from now on."""
    global TIMEOUT_S
    if timeout_s != TIMEOUT_S:
        TIMEOUT_S = timeout_s
        open_filesystem.cache_clear()
        _for_one_request.cache_clear()


@lru_cache(maxsize=16)
def open_filesystem(root_uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a root, and the root's path in it.

    Raises:
        ValueError: the URI's scheme is unknown.
        OSError: the object store cannot be reached.
    """
    if "://" not in root_uri:
        return pafs.LocalFileSystem(), Path(root_uri).expanduser().absolute().as_posix()
    if root_uri.startswith(SCHEME):
        return served_filesystem(TIMEOUT_S), root_uri.removeprefix(SCHEME)
    try:
        filesystem, root = pafs.FileSystem.from_uri(root_uri)
    except pa.ArrowInvalid as error:
        raise ValueError(str(error)) from error
    if isinstance(filesystem, pafs.S3FileSystem):
        # Only a write in the background refuses to publish an object of which a part failed.
        filesystem = _changed(filesystem, background_writes=True, request_timeout=TIMEOUT_S / _S3_REQUESTS)
    elif isinstance(filesystem, pafs.GcsFileSystem):  # by itself it would ask again for a quarter of an hour
        filesystem = _changed(filesystem, retry_time_limit=timedelta(seconds=TIMEOUT_S))
    return filesystem, root.rstrip("/")


@lru_cache(maxsize=16)
def _for_one_request(root_uri: str) -> pafs.FileSystem:
    """As `open_filesystem`, for objects that fit into one request: a larger one could become a part of itself."""
    filesystem, _ = open_filesystem(root_uri)
    if isinstance(filesystem, pafs.S3FileSystem):
        return _changed(filesystem, allow_delayed_open=True)
    return filesystem


def _changed(filesystem: pafs.S3FileSystem | pafs.GcsFileSystem, **options: Any) -> pafs.FileSystem:
    rebuild, (present, *_) = filesystem.__reduce__()
    return rebuild(present | options)


def persistent(action: Callable[[], T], attempts: int = ATTEMPTS, pause_s: float = PAUSE_S) -> T:
    """Run an operation; try it again after a failure of the storage, with a pause that doubles each time.

    Args:
        action: the operation.
        attempts: number of attempts in all.
        pause_s: seconds before the second attempt.

    Raises:
        FileNotFoundError, CorruptCheckpoint: at once, because another attempt would not help.
        StorageUnavailable: the last attempt failed.
    """
    for attempt in range(attempts):
        try:
            return action()
        except (FileNotFoundError, CorruptCheckpoint):
            raise
        except (OSError, pa.ArrowException) as error:
            if attempt + 1 == attempts:
                raise StorageUnavailable(str(error) or type(error).__name__) from error
        time.sleep(pause_s * 2**attempt)
    raise AssertionError("attempts must be positive")


def _write_object(filesystem: pafs.FileSystem, path: str, parts: Sequence[memoryview], activity: Activity) -> None:
    """Put an object.

    Closing the stream publishes all that was written, unless a part has failed. So a call that was left behind goes on
    to the end: the object never becomes a part of itself.
    """
    with filesystem.open_output_stream(path) as stream:
        waiting = 0
        for piece in in_pieces(parts):
            stream.write(piece)
            waiting += len(piece)
            if waiting >= _FLUSH_BYTES:
                stream.flush()
                waiting = 0
            activity.moved_bytes += len(piece)
