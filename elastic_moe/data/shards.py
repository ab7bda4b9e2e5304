"""Token shards: a flat array of token ids on disk, memory-mapped, and an index with its type, length and checksum.

Sample i of sequence length S is tokens [i*S, i*S+S+1): the inputs, and the targets one token later. Nothing depends on
S, so the sequence length may change, and every worker computes the place of every sample by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic_moe.errors import UserError

FORMAT = 1
_CHUNK = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def index_path(path: str | Path) -> Path:
    """Path of a token file's index."""
    return Path(path).with_suffix(".json")


class TokenShardWriter:
    """Writes a token file piece by piece; `close` writes the index. Not atomic: `prepare.py` renames the directory."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._vocab_size = path, vocab_size
        self._dtype = token_dtype(vocab_size)
        self._digest, self._tokens = hashlib.sha256(), 0
        self._stream = path.open("wb")

    def append(self, ids: Sequence[int]) -> None:
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._digest.update(data)
        self._stream.write(data)
        self._tokens += len(ids)

    def close(self) -> int:
        """Finish the file and write its index. Returns the number of tokens."""
        self._stream.close()
        index = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "tokens": self._tokens,
            "vocab_size": self._vocab_size,
            "sha256": self._digest.hexdigest(),
        }
        index_path(self._path).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return self._tokens


class TokenShard:
    """A memory-mapped token file, read-only."""

    def __init__(self, path: Path, tokens: NDArray[np.unsignedinteger], vocab_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self._tokens = tokens

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> TokenShard:
        """Open a shard and check it.

        Args:
            path: the token file; its index lies beside it.
            verify: compare the checksum too, which reads the whole file once.

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
            if verify and file_sha256(path) != index["sha256"]:
                raise UserError(f"token shard {path} is corrupt; delete its directory and start again")
            tokens = np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)
            return cls(path, tokens, int(index["vocab_size"]))
        except OSError as error:
            raise UserError(f"cannot read the token shard {path}: {error.strerror}") from error
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"the index of token shard {path} is damaged; delete its directory") from error

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def num_samples(self, seq_len: int) -> int:
        """Number of whole samples of this sequence length."""
        return max(len(self._tokens) - 1, 0) // seq_len

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
        window_BS1 = self._tokens[ids_B[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)
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
