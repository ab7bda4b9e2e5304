"""Files of a corpus wherever they lie: on a disk of this machine, in an object store, or behind HTTP.

Object stores are read through `pyarrow.fs`, as checkpoints are. `http(s)://` and `hf://` are read through fsspec, which
torch brings (aiohttp comes with Ray, the file system of `hf://` with tokenizers). A server's file is read from begin to
end where the server sends no byte ranges, and not in parts.

A server that fails or says nothing for a while is asked again, from the byte that was to come; so no caller has to. A
file that is read may be written meanwhile, by its time or by what its server tells; that is seen afterwards.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from elastic_moe.errors import UserError

STORES = ("s3", "gs", "file")  # by pyarrow
SERVERS = ("http", "https", "hf")  # by fsspec
SILENCE_S = 30.0  # of a server, after which it is asked again
ATTEMPTS, PAUSE_S = 4, 1.0  # of each read; each pause is twice as long as the one before
UNKNOWN = -1  # size of a file of which a server does not tell it
_T = TypeVar("_T")
_BUFFER = 1 << 20  # bytes that are read at once


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that was found. `size`: bytes, or UNKNOWN. `version` changes with its content: a time, or a hash of what a
    server tells."""

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


def has_ranges(path: str) -> bool:
    """Whether a part of a file can be read without what lies before it.

    Raises:
        OSError: it cannot be read.
    """
    if scheme_of(path) not in SERVERS:
        return True
    with closing(_Served(path)) as file:
        return file.has_ranges()


def list_url(url: str) -> tuple[list[Listed], str]:
    """The files of a URL, a file's or a directory's, and the prefix that their paths have in common.

    Raises:
        UserError: there is nothing, or it cannot be reached.
    """
    scheme = scheme_of(url)
    try:
        found = _list_server(url) if scheme in SERVERS else _list_store(url)
    except (OSError, ValueError) as error:
        raise UserError(f"data.corpus={url} cannot be reached: {why_unreadable(error)}") from error
    if not found:
        raise UserError(f"data.corpus={url} does not exist, or is empty.")
    prefix = url.partition("?")[0].rstrip("/") + "/"
    whole = all(one.path.startswith(prefix) for one in found)
    return found, prefix if whole else prefix.rstrip("/").rpartition("/")[0] + "/"


def why_unreadable(error: BaseException) -> str:
    """One line about a file that cannot be read."""
    if isinstance(error, FileNotFoundError) and error.errno is None and error.__cause__ is not None:
        error = error.__cause__  # fsspec has but the address in its own
    if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
        return f"its server says nothing for {SILENCE_S:g} s"
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def has_changed(path: str, size: int, version: int) -> bool:
    """Whether a file is no more what `Listed` tells of it.

    Raises:
        OSError: that cannot be seen.
    """
    scheme = scheme_of(path)
    if scheme in SERVERS:
        ask = _ask_hub if scheme == "hf" else _server(scheme).info
        now = _patiently(lambda: _of_server(path, ask(path)))
    elif scheme:
        filesystem, inner = _store(path)
        info = filesystem.get_file_info(inner)
        now = Listed(path, info.size, info.mtime_ns or 0)
    else:
        found = os.stat(path)
        now = Listed(path, found.st_size, found.st_mtime_ns)
    return (now.size, now.version) != (size, version)


def _list_server(url: str) -> list[Listed]:
    server = _server(scheme_of(url))
    with _as_os_error():
        info: dict[str, Any] = server.info(url)
    if info.get("type") == "directory":  # of hf:// only; a web server has no listing to rely on
        entries = server.find(url, detail=True).values()
        return [_of_server(f"hf://{entry['name']}", entry) for entry in entries]
    return [_of_server(url, info)]


def _ask_hub(path: str) -> dict[str, Any]:
    """What the hub tells of a file now; its file system keeps what it was told before."""
    from huggingface_hub import HfApi

    at = _server("hf").resolve_path(path)
    found = HfApi().get_paths_info(at.repo_id, at.path_in_repo, revision=at.revision, repo_type=at.repo_type)
    if not found:
        raise FileNotFoundError(f"{path} is no more")
    return vars(found[0])


def _of_server(path: str, info: dict[str, Any]) -> Listed:
    told = [str(info[name]) for name in ("ETag", "etag", "Last-Modified", "blob_id", "size") if info.get(name)]
    version = int.from_bytes(hashlib.sha256(" ".join(told).encode()).digest()[:6], "little")
    size = info.get("size")
    return Listed(path, UNKNOWN if size is None else int(size), version)


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

    if scheme == "hf":
        return fsspec.filesystem(scheme)
    import aiohttp

    # Without a bound of the whole: a file may take hours.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout})


def _patiently(action: Callable[[], _T], after: Callable[[], object] = lambda: None) -> _T:
    """The result of an action that asks a server, which may fail a few times; `after` each failure.

    Raises:
        OSError: it has failed too often, or the server refuses it for good.
    """
    for attempt in range(ATTEMPTS):
        try:
            with _as_os_error():
                return action()
        except OSError as error:
            after()
            if attempt + 1 == ATTEMPTS or _is_final(error):
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError


def _is_final(error: OSError) -> bool:
    """Whether a server would answer the same again."""
    cause = error.__cause__ or error
    status = getattr(cause, "status", 0) or getattr(getattr(cause, "response", None), "status_code", 0)
    if status:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(cause, (FileNotFoundError, PermissionError))


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
    """A file of a server. Where that sends no byte ranges, a place is reached by reading what lies before it."""

    def __init__(self, path: str) -> None:
        self._path, self._at, self._file, self._file_at = path, 0, cast(Any, None), 0
        self._ranges = True
        self._size = _patiently(self._told_size, self._drop)

    def _told_size(self) -> int | None:
        size: int | None = self._opened().size
        return size or _server(scheme_of(self._path)).info(self._path).get("size")

    def _opened(self) -> Any:
        """The open file, at the next byte."""
        if not self._ranges and self._file_at > self._at:
            self._drop()
        if self._file is None:
            self._file, self._file_at = self._open(), 0
            self._ranges = self._ranges and not _is_stream(self._file)
        if self._ranges:
            self._file.seek(self._at)
            self._file_at = self._at
        while self._file_at < self._at:
            if not (skipped := len(self._file.read(min(_BUFFER, self._at - self._file_at)))):
                raise OSError("it has become shorter")
            self._file_at += skipped
        return self._file

    def _open(self) -> Any:
        return _server(scheme_of(self._path)).open(self._path, "rb", block_size=_BUFFER if self._ranges else 0)

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
        self._file = None

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._opened().read(size)
        except ValueError:  # fsspec's, where a server sends the whole file instead of a range
            if not self._ranges:
                raise
            self._drop()
            self._ranges = False
            data = self._opened().read(size)
        self._file_at += len(data)
        return data

    def has_ranges(self) -> bool:
        """Whether the server sends parts of the file."""
        if self._ranges and self._size:
            at, self._at = self._at, self._size // 2
            _patiently(lambda: self._read(1), self._drop)
            self._at = at
        return self._ranges

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation("its server does not tell its size")
        self._at = max(offset + (0, self._at, self._size)[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = _patiently(lambda: self._read(len(buffer)), self._drop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()


def _is_stream(file: Any) -> bool:
    from fsspec.implementations.http import HTTPStreamFile

    return isinstance(file, HTTPStreamFile)


def local_file(path: Path) -> Listed | None:
    """A file of this machine; None for a pipe, a socket or a device.

    Raises:
        OSError: a broken link, or no right to see it.
    """
    found = os.stat(path)
    return Listed(str(path), found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
