"""Keeps a run's identity in its two places: the run directory and the checkpoint root."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from elastic_moe.checkpoint.identity import RunIdentity, read_identity, write_identity
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage


class IdentityFiles:
    """The two files of a run's identity. One thread at a time may change them.

    Args:
        run_dir: the run directory.
        root: the checkpoint root, a directory or URI.
        identity: the identity; it is not written before it changes.
    """

    def __init__(self, run_dir: Path, root: str, identity: RunIdentity) -> None:
        self._places, self._identity, self._written = (str(run_dir), root), identity, True

    @classmethod
    def open(cls, run_dir: Path, root: str) -> IdentityFiles:
        """The identity that the start of the run left in the run directory; a new one if there is none.

        Raises:
            OSError: the identity is new and cannot be written.
        """
        try:
            identity = read_identity(Storage(str(run_dir)))
        except CorruptCheckpoint:
            identity = None
        if identity is not None:
            return cls(run_dir, root, identity)
        try:
            identity = read_identity(Storage(root))
        except CorruptCheckpoint:
            identity = None
        files = cls(run_dir, root, identity or RunIdentity.new(str(run_dir)))
        files.change(files.identity)
        return files

    @property
    def identity(self) -> RunIdentity:
        """The present identity; safe to read from any thread."""
        return self._identity

    def begin_start(self) -> None:
        """The run is started: its generations are counted anew. What cannot be written now is written later."""
        if self._identity.forked_in:
            with suppress(OSError):
                self.change(replace(self._identity, forked_in=0))

    def change(self, identity: RunIdentity) -> None:
        """Take a new identity, and write it.

        Raises:
            OSError: it cannot be written now. It counts nevertheless, and `write` tries again.
        """
        self._identity, self._written = identity, False
        self.write()

    def write(self) -> None:
        """Write the identity unless it is written.

        Raises:
            OSError: it cannot be written now.
        """
        if not self._written:
            for place in self._places:
                write_identity(Storage(place), self._identity)
            self._written = True
