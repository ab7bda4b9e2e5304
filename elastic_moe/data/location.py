"""Files of a corpus wherever they lie: on a disk of this machine, in an object store, or behind HTTP.

Object stores are read through `pyarrow.fs`, as checkpoints are. `http(s)://` and `hf://` are read through fsspec, which
torch brings (aiohttp comes with Ray, the file system of `hf://` with tokenizers). A server without byte ranges is read
from begin to end, which is enough for everything but Parquet.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from elastic_moe.errors import UserError

STORES = ("s3", "gs", "file")  # by pyarrow
SERVERS = ("http", "https", "hf")  # by fsspec
_BUFFER = 1 << 20  # bytes that are read at once


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that was found. `version` changes with its content: a time, or a hash of what a server tells."""

    path: str
    size: int
    version: int


def scheme_of(path: str) -> str:
    """The scheme of a URL; "" for a path of this machine."""
    scheme, mark, _ = path.partition("://")
    return scheme.lower() if mark and scheme.isalnum() else ""


def check_scheme(key: str, path: str) -> None:
    """Refuse a URL that cannot be read.

    Raises:
        UserError: its scheme is none of `STORES` and `SERVERS`.
    """
    if (scheme := scheme_of(path)) and scheme not in STORES + SERVERS:
        known = ", ".join(f"{name}://" for name in STORES + SERVERS)
        raise UserError(f"{key}={path}: {scheme}:// cannot be read; it can be {known} or a path.")


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading; it can seek, unless it lies on a server without byte ranges.

    Raises:
        OSError: it cannot be opened.
    """
    scheme = scheme_of(path)
    if not scheme:
        return open(path, "rb")
    if scheme in SERVERS:
        return cast(BinaryIO, io.BufferedReader(_Served(path), _BUFFER))
    filesystem, inner = _store(path)
    return cast(BinaryIO, io.BufferedReader(filesystem.open_input_file(inner), _BUFFER))


def list_url(url: str) -> tuple[list[Listed], str]:
    """The files of a URL, a file's or a directory's, and the prefix that their paths have in common.

    Raises:
        UserError: there is nothing, or it cannot be reached.
    """
    scheme = scheme_of(url)
    try:
        found = _list_server(url) if scheme in SERVERS else _list_store(url)
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus={url} cannot be reached: {error or type(error).__name__}") from error
    if not found:
        raise UserError(f"data.corpus={url} does not exist, or is empty.")
    prefix = url.partition("?")[0].rstrip("/") + "/"
    whole = all(one.path.startswith(prefix) for one in found)
    return found, prefix if whole else prefix.rstrip("/").rpartition("/")[0] + "/"


def _list_server(url: str) -> list[Listed]:
    server = _server(scheme_of(url))
    with _as_os_error():
        info: dict[str, Any] = server.info(url)
    if info.get("type") == "directory":  # of hf:// only; a web server has no listing to rely on
        entries = server.find(url, detail=True).values()
        return [_of_server(f"hf://{entry['name']}", entry) for entry in entries]
    return [_of_server(url, info)]


def _of_server(path: str, info: dict[str, Any]) -> Listed:
    told = [str(info[name]) for name in ("ETag", "etag", "Last-Modified", "blob_id", "size") if info.get(name)]
    version = int.from_bytes(hashlib.sha256(" ".join(told).encode()).digest()[:6], "little")
    return Listed(path, int(info.get("size") or 0), version)


def _list_store(url: str) -> list[Listed]:
    from pyarrow import fs as pafs

    filesystem, inner = _store(url)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.File:
        return [Listed(url, info.size, info.mtime_ns or 0)]
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    base, mark, query = url.partition("?")
    base, tail = base.rstrip("/"), mark + query
    files = [one for one in infos if one.type == pafs.FileType.File]
    return [Listed(base + one.path.removeprefix(inner) + tail, one.size, one.mtime_ns or 0) for one in files]


def _store(url: str) -> tuple[Any, str]:
    """The file system of an object store, and the path in it."""
    from elastic_moe.checkpoint.storage import open_filesystem

    head, _, rest = url.partition("://")
    if head.lower() == "file":
        filesystem, inner = open_filesystem("/")
        return filesystem, "/" + rest.lstrip("/")
    bucket, _, inner = rest.partition("/")
    filesystem, root = open_filesystem(f"{head}://{_without_query(bucket, url)}")
    return filesystem, f"{root}/{inner.partition('?')[0]}".rstrip("/")


def _without_query(bucket: str, url: str) -> str:
    """The bucket, with the query of the URL (`?endpoint_override=...`), which tells how it is reached."""
    _, mark, query = url.partition("?")
    return bucket + mark + query


@lru_cache(maxsize=4)
def _server(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme)


@contextmanager
def _as_os_error() -> Generator[None]:
    """Each library below fsspec has exceptions of its own for what a server or a network does."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Served(io.RawIOBase):
    """A file of a server."""

    def __init__(self, path: str) -> None:
        with _as_os_error():
            self._file = _server(scheme_of(path)).open(path, "rb", block_size=_BUFFER)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _as_os_error():
            return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def local_file(path: Path) -> Listed | None:
    """A file of this machine; None for a pipe, a socket or a device.

    Raises:
        OSError: a broken link, or no right to see it.
    """
    found = os.stat(path)
    return Listed(str(path), found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
