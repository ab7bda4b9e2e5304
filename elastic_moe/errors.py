"""Errors that say whose fault it is. UserError: bad input, one sentence, exit code 2. The rest are events of a run."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one sentence that names the key or file and says what to do.

    Attributes:
        exit_code: of a command that ends with this error.
    """

    exit_code = 2


class StorageFailed(UserError):
    """The checkpoint root could not be read or written for longer than the run waits. Exit code 3."""

    exit_code = 3


class GroupAborted(RuntimeError):
    """A collective of this generation cannot complete: a peer died or a newer view was published."""


class FaultyWorker(RuntimeError):
    """This worker's numbers were not finite again and again while those of the others were; it leaves the run."""


class Diverged(RuntimeError):
    """No update was possible for many steps in a row. The message is a sentence; the last state was saved."""


class CoordinatorLost(RuntimeError):
    """The coordinator was not heard for so long that this worker waits for it no more. The message is a sentence."""


class Evicted(RuntimeError):
    """The coordinator no longer counts this worker as a member; the process must not touch the run any more."""
