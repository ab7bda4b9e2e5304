"""Storage of checkpoints: a directory or an object store behind one small interface, built on `pyarrow.fs`.

A local file is written under a temporary name, synced to disk and then renamed, so its name never shows a partial file.
In an object store, a put is atomic by itself. Storage can fail for a short time, so an operation is tried several times
before its OSError is raised.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from elastic_moe.errors import UserError

ATTEMPTS = 3
PAUSE_S = 0.2
_CHUNK = 1 << 22
T = TypeVar("T")


class CorruptCheckpoint(OSError):
    """A file of a checkpoint differs from its manifest: missing, truncated or changed."""


class StorageUnavailable(OSError):
    """The storage failed for another reason than absence or damage, at every attempt.

    It tells nothing about the checkpoints: they may be there and whole. So it never means that there are none.
    """


class Storage:
    """One checkpoint root.

    Args:
        root_uri: a path, or a URI that pyarrow knows (file://, s3://, gs://, hdfs://).

    Raises:
        UserError: the URI's scheme is unknown.
    """

    def __init__(self, root_uri: str) -> None:
        if "://" in root_uri:
            try:
                self._fs, root = pafs.FileSystem.from_uri(root_uri)
            except (pa.ArrowException, ValueError) as error:
                raise UserError(
                    f"checkpoint.dir={root_uri} cannot be used ({error}); give a path, s3:// or gs:// URI"
                ) from error
        else:
            self._fs, root = pafs.LocalFileSystem(), Path(root_uri).expanduser().absolute().as_posix()
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """Full path of a name relative to the root."""
        return f"{self._root}/{name}" if name else self._root

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file atomically, replacing one of that name."""
        path = self.path(name)
        if not self._local:
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        parent = os.path.dirname(path)
        os.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/.{uuid.uuid4().hex}.tmp"
        try:
            with self._fs.open_output_stream(temporary) as stream:
                stream.write(data)
            _sync(temporary)
            self._fs.move(temporary, path)
            _sync(parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self._fs.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def read_ranges(self, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Read ranges of one file.

        Args:
            name: path relative to the root.
            ranges: (offset, length) in bytes.

        Raises:
            CorruptCheckpoint: the file ends before a range does.
        """
        pieces: list[bytes] = []
        with self._fs.open_input_file(self.path(name)) as file:
            for offset, length in ranges:
                file.seek(offset)
                piece = file.read(length)
                if len(piece) != length:
                    raise CorruptCheckpoint(f"{self.path(name)} is truncated")
                pieces.append(piece)
        return pieces

    def size(self, name: str) -> int:
        """Size of a file in bytes, or -1 if there is none."""
        info = self._fs.get_file_info(self.path(name))
        return info.size if info.type == pafs.FileType.File else -1

    def sha256(self, name: str) -> str:
        """SHA-256 checksum of a file, which is read in chunks."""
        digest = hashlib.sha256()
        with self._fs.open_input_stream(self.path(name)) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def directories(self) -> list[str]:
        """Names of the directories directly below the root; an empty list if the root does not exist."""
        infos = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.size(name) >= 0:
            self._fs.delete_file(self.path(name))

    def remove_directory(self, name: str) -> None:
        """Delete a directory with its content."""
        self._fs.delete_dir(self.path(name))


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


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
