"""Errors that say whose fault it is. UserError: bad input, one sentence, exit code 2. The rest are events of a run."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one sentence that names the key or file and says what to do."""


class GroupAborted(RuntimeError):
    """A collective of this generation cannot complete: a peer died or a newer view was published."""


class Evicted(RuntimeError):
    """The coordinator no longer counts this worker as a member; the process must not touch the run any more."""
