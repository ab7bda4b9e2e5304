"""Token shards: a flat array of token ids on disk, memory-mapped, and an index with its type, length and checksum.

Sample i of sequence length S is tokens [i*S, i*S+S+1): the inputs, and the targets one token later. Nothing depends on
S, so the sequence length may change, and every worker computes the place of every sample by itself.

A checksum is compared once: what was found is kept beside the file, with the size, the time and the inode of the file
that was read. A file of another size or time, or a copy, is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import UserError

FORMAT = 1
_CHUNK = 1 << 22
_SETTLED_S = 3.0  # a file that was changed so long ago has another time after the next change


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def index_path(path: str | Path) -> Path:
    """Path of a token file's index."""
    return Path(path).with_suffix(".json")


class TokenShardWriter:
    """Writes a token file piece by piece; `close` writes the index. Not atomic: `prepare.py` renames the directory.

    Args:
        path: of the file.
        vocab_size: ids are below it.
        kept: tokens of a file that was begun before: it goes on after them.

    Raises:
        OSError: the file cannot be written, or has fewer tokens.
    """

    def __init__(self, path: Path, vocab_size: int, kept: int = 0) -> None:
        self._path, self._vocab_size = path, vocab_size
        self._dtype = token_dtype(vocab_size)
        self._digest, self.tokens = hashlib.sha256(), kept
        if kept:
            self._keep(kept * self._dtype.itemsize)
        self._stream = path.open("r+b" if kept else "wb")
        self._stream.seek(0, os.SEEK_END)

    def _keep(self, size: int) -> None:
        """Take the first bytes of the file as written, and cut off the rest."""
        if self._path.stat().st_size < size:
            raise OSError(f"{self._path} is truncated")
        os.truncate(self._path, size)
        with self._path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                self._digest.update(chunk)

    @property
    def sha256(self) -> str:
        """Checksum of what was written so far."""
        return self._digest.hexdigest()

    def append(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        self.append_bytes(np.asarray(ids).astype(self._dtype).tobytes())

    def append_bytes(self, data: bytes | memoryview) -> None:
        """Append ids that have the file's type already."""
        self._digest.update(data)
        self._stream.write(data)
        self.tokens += len(data) // self._dtype.itemsize

    def sync(self) -> None:
        """Return when what was written is on the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def abandon(self) -> None:
        """Close the file without an index."""
        self._stream.close()

    def close(self, spans: Sequence[tuple[str, int]] = ()) -> int:
        """Finish the file and write its index.

        Args:
            spans: of a mixture: name and number of tokens of each corpus, in order.

        Returns:
            The number of tokens.
        """
        self._stream.close()
        index = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "tokens": self.tokens,
            "vocab_size": self._vocab_size,
            "sha256": self.sha256,
        }
        if spans:
            index["spans"] = [list(span) for span in spans]
        index_path(self._path).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return self.tokens


class TokenShard:
    """A memory-mapped token file, read-only.

    Attributes:
        path: of the file.
        vocab_size: ids are below it.
        spans: of a mixture: name and number of tokens of each corpus, in the order of the file; else ().
    """

    def __init__(
        self,
        path: Path,
        tokens: NDArray[np.unsignedinteger],
        vocab_size: int,
        spans: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self.path, self.vocab_size, self.spans = path, vocab_size, spans
        self._tokens = tokens

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> TokenShard:
        """Open a shard and check it.

        Args:
            path: the token file; its index lies beside it.
            verify: compare the checksum too, unless that was done before.

        Raises:
            UserError: the file or its index is missing or damaged.
        """
        path = Path(path)
        try:
            index = json.loads(index_path(path).read_text(encoding="utf-8"))
            dtype, count = np.dtype(index["dtype"]), int(index["tokens"])
            if index["format"] != FORMAT:
                raise UserError(f"token shard {path} has format {index['format']}, not {FORMAT}; delete its directory")
            size = path.stat().st_size
            if size != count * dtype.itemsize:
                raise UserError(f"token shard {path} is truncated; delete its directory and start again")
            if verify and not _is_known(path, index["sha256"]):
                if file_sha256(path) != index["sha256"]:
                    raise UserError(f"token shard {path} is corrupt; delete its directory and start again")
                note_checked(path, index["sha256"])
            tokens = np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)
            spans = tuple((str(name), int(tokens)) for name, tokens in index.get("spans", ()))
            return cls(path, tokens, int(index["vocab_size"]), spans)
        except OSError as error:
            raise UserError(f"cannot read the token shard {path}: {error.strerror}") from error
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"the index of token shard {path} is damaged; delete its directory") from error

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def num_samples(self, seq_len: int) -> int:
        """Number of whole samples of this sequence length, of all corpora together."""
        return sum(self.samples(seq_len))

    def samples(self, seq_len: int) -> list[int]:
        """Number of whole samples of this sequence length in each corpus. None has tokens of two corpora."""
        sizes = [size for _, size in self.spans] or [len(self._tokens)]
        return [max(size - 1, 0) // seq_len for size in sizes]

    def _begins(self, ids_B: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
        """The first token of each sample, int64 [B]. Samples are numbered through all corpora."""
        if not self.spans:
            return ids_B * seq_len
        samples = np.cumsum([0, *self.samples(seq_len)])
        begins = np.cumsum([0, *(size for _, size in self.spans)])
        corpus_B = np.searchsorted(samples, ids_B, side="right") - 1
        return begins[corpus_B] + (ids_B - samples[corpus_B]) * seq_len

    def batch(self, ids: Iterable[int] | NDArray, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read samples by id.

        Args:
            ids: sample ids, each below `num_samples(seq_len)`; may be empty.
            seq_len: tokens per sample.

        Returns:
            (inputs, targets), each int64 [len(ids), seq_len].

        Raises:
            IndexError: an id is out of range.
        """
        ids_B = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if ids_B.size and not (ids_B.min() >= 0 and ids_B.max() < self.num_samples(seq_len)):
            raise IndexError(
                f"sample ids {ids_B.min()}..{ids_B.max()}, but there are {self.num_samples(seq_len)} samples"
            )
        window_BS1 = self._tokens[self._begins(ids_B, seq_len)[:, None] + np.arange(seq_len + 1)].astype(np.int64)
        return window_BS1[:, :-1].copy(), window_BS1[:, 1:].copy()


def token_digest(*paths: str | Path) -> str:
    """Digest of the tokens of some token files, from the checksums in their indexes."""
    sums = [json.loads(index_path(path).read_text(encoding="utf-8"))["sha256"] for path in paths]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 checksum of a file, which is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def note_checked(path: Path, sha256: str, settled: bool = False) -> None:
    """Keep beside a token file that its content has this checksum. Where nothing can be written it is checked again.

    Args:
        path: of the token file.
        sha256: its checksum, which was just computed.
        settled: set the file's time back, so that any later change gives it another one; else a file that was changed
            just now is not noted, for the same reason.
    """
    with suppress(OSError):
        if settled:
            before_s = time.time() - _SETTLED_S
            os.utime(path, (before_s, before_s))
        elif time.time() - path.stat().st_mtime < _SETTLED_S:
            return
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        temporary.write_text(json.dumps([sha256, *_identity(path)]))
        os.replace(temporary, _note_path(path))


def _is_known(path: Path, sha256: str) -> bool:
    """Whether the checksum of a token file was compared before."""
    try:
        return json.loads(_note_path(path).read_text()) == [sha256, *_identity(path)]
    except (OSError, ValueError):
        return False


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _note_path(path: Path) -> Path:
    return path.with_suffix(".checked")
