"""Files of the coordinator's node, for a worker that does not see them: a file system for pyarrow over HTTP.

A few machines without a network file system have one place where a run's files are: the node of its coordinator
(`coordination/file_server.py`). A worker elsewhere names it `run://PLACE/PATH`. Reads are ranges of a file; a write is
one request, and its last byte publishes the file. A coordinator that is started again has another address, so that is
asked for anew whenever a connection is made.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs as pafs

SCHEME = "run://"
ERRNO = "X-Errno"  # header of an answer that a failed call of the operating system has caused
PATIENCE_S = 30.0  # for a coordinator that is just started again
PAUSE_S = 0.2
MAX_LISTING, MAX_SENTENCE = 1 << 26, 1 << 12  # bytes of an answer that is no part of a file

Address = tuple[str, int]
T = TypeVar("T")
Locate = Callable[[], Address | None]
_source: list[tuple[Locate, str]] = []  # of this process, which works for one run


def connect_to(locate: Locate, token: str) -> None:
    """From now on, `run://` in this process is what this run's coordinator serves.

    Args:
        locate: returns host and port of the coordinator's file server, or None while there is none.
        token: shared secret of the run.
    """
    _source[:] = [(locate, token)]


def served_filesystem(timeout_s: float) -> pafs.FileSystem:
    """The file system of `run://`; see `connect_to`.

    Args:
        timeout_s: longest time without an answer, in seconds.

    Raises:
        ValueError: this process works for no run.
    """
    if not _source:
        raise ValueError(f"{SCHEME} names files of a run, and this process is no worker of one")
    locate, token = _source[0]
    return pafs.PyFileSystem(ServedFiles(FileClient(locate, token, timeout_s)))


class FileClient:
    """Makes requests to the coordinator's file server.

    Args:
        locate, token: as in `connect_to`.
        timeout_s: longest time without an answer, in seconds.
    """

    def __init__(self, locate: Locate, token: str, timeout_s: float) -> None:
        self._locate, self._token, self._timeout_s = locate, token, timeout_s

    def connect(self) -> http.client.HTTPConnection:
        """A new connection. Waits `PATIENCE_S` for a server that is just started again.

        Raises:
            OSError: nobody answers.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            address = self._locate()
            try:
                if address is None:
                    raise ConnectionError("the coordinator's address is not known")
                connection = http.client.HTTPConnection(*address, timeout=self._timeout_s)
                connection.connect()
                return connection
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(PAUSE_S)

    def headers(self, **more: str) -> dict[str, str]:
        """Headers of a request."""
        return {"Authorization": f"Bearer {self._token}", **more}

    def info(self, path: str) -> pafs.FileInfo:
        """What is at a path."""
        return self._ask(path, "info", lambda found: _as_info(path, found))

    def listing(self, path: str) -> list[pafs.FileInfo]:
        """What is in a directory."""
        return self._ask(path, "list", lambda found: [_as_info(f"{path}/{entry['name']}", entry) for entry in found])

    def _ask(self, path: str, what: str, read: Callable[[Any], T]) -> T:
        """The answer to a question, in JSON.

        Raises:
            OSError: there is none, or it is not what was asked for.
        """
        connection = self.connect()
        try:
            connection.request("GET", f"/{quote(path)}?{what}", headers=self.headers())
            return read(json.loads(_content(connection.getresponse(), path, MAX_LISTING)))
        except (http.client.HTTPException, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConnectionError(f"the coordinator's node gave no answer about {path}: {error!r}") from error
        finally:
            connection.close()


class ServedFiles(pafs.FileSystemHandler):
    """What `checkpoint/storage.py` asks of a file system. Nothing is deleted from here."""

    def __init__(self, client: FileClient) -> None:
        self._client = client

    def get_type_name(self) -> str:
        return "run"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._client.info(path) for path in paths]

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        assert not selector.recursive
        return self._client.listing(selector.base_dir)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        found = self._client.info(path)
        if found.type == pafs.FileType.NotFound:
            raise FileNotFoundError(f"{SCHEME}{path}")
        if found.type != pafs.FileType.File:
            raise IsADirectoryError(f"{SCHEME}{path} is no file")
        return pa.PythonFile(_Reader(self._client, path, found.size), mode="r")

    def open_output_stream(self, path: str, metadata: Mapping[str, str]) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self._client, path), mode="w")

    def _refuse(self, *_: object) -> NoReturn:
        raise NotImplementedError("workers read and write the files of a run, and change nothing else")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_append_stream = _refuse


class _Reader(io.RawIOBase):
    """A file of so many bytes; every read is a range of it, on one connection."""

    def __init__(self, client: FileClient, path: str, size: int) -> None:
        self._client, self._path, self._size, self._at = client, path, size, 0
        self._connection: http.client.HTTPConnection | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        if self._connection is None:
            self._connection = self._client.connect()
        wanted = self._client.headers(Range=f"bytes={self._at}-{stop - 1}")
        try:
            self._connection.request("GET", f"/{quote(self._path)}", headers=wanted)
            content = _content(self._connection.getresponse(), self._path, stop - self._at)
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"{SCHEME}{self._path} could not be read: {error!r}") from error
        if len(content) != stop - self._at:
            raise ConnectionError(f"{SCHEME}{self._path} came with {len(content)} bytes, not {stop - self._at}")
        self._at += len(content)
        return content

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        super().close()


class _Writer(io.RawIOBase):
    """A new content of a file. It is published when this is closed, unless a part of it has failed."""

    def __init__(self, client: FileClient, path: str) -> None:
        self._path, self._whole = path, True
        self._connection = client.connect()
        self._connection.putrequest("PUT", f"/{quote(path)}")
        for name, value in client.headers(**{"Transfer-Encoding": "chunked"}).items():
            self._connection.putheader(name, value)
        self._connection.endheaders()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            if wait([self._connection.sock], 0):
                raise ConnectionError(f"{SCHEME}{self._path} could not be written")  # an answer before the end
            if len(data):
                self._connection.send(b"%x\r\n" % len(data))
                self._connection.send(data)
                self._connection.send(b"\r\n")
        except OSError as error:
            self._whole = False
            self._raise_answer(error)
        return len(data)

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            if self._whole:
                self._connection.send(b"0\r\n\r\n")
                _content(self._connection.getresponse(), self._path, MAX_SENTENCE)
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionError(f"{SCHEME}{self._path} could not be written: {error!r}") from error
        finally:
            self._connection.close()

    def _raise_answer(self, error: OSError) -> NoReturn:
        """Raise what the server said before it closed the connection, such as that its disk is full."""
        with suppress(http.client.HTTPException, ValueError):
            _content(self._connection.getresponse(), self._path, MAX_SENTENCE)
        raise error


def _content(answer: http.client.HTTPResponse, path: str, most: int) -> bytes:
    """The content of an answer, of which so many bytes are read at most.

    Raises:
        FileNotFoundError, OSError: the server says why there is none.
        ValueError: the answer is damaged, or has more bytes.
    """
    failed = answer.status >= http.HTTPStatus.BAD_REQUEST
    content = answer.read(MAX_SENTENCE if failed else most)
    if answer.status == http.HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(f"{SCHEME}{path}")
    if failed:
        shown = answer.headers.get(ERRNO, "")
        number = int(shown) if re.fullmatch(r"[0-9]{1,4}", shown) else 0
        said = content.decode(errors="replace") or answer.reason
        said = f"{SCHEME}{path} on the coordinator's node: {said}"
        raise OSError(number, os.strerror(number), said) if number else ConnectionError(said)
    if answer.length:
        raise ValueError(f"it has {len(content) + answer.length} bytes, of which {len(content)} came or were asked for")
    return content


def _as_info(path: str, found: Mapping[str, Any]) -> pafs.FileInfo:
    kinds = {"file": pafs.FileType.File, "directory": pafs.FileType.Directory, "none": pafs.FileType.NotFound}
    kind = kinds.get(str(found["kind"]), pafs.FileType.Unknown)
    if kind != pafs.FileType.File:
        return pafs.FileInfo(path, kind)
    if (size := int(found["size"])) < 0:
        raise ValueError(f"a file of {size} bytes")
    return pafs.FileInfo(path, kind, size=size, mtime_ns=int(found["changed_ns"]))
