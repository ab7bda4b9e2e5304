"""Errors that say whose fault it is. UserError: bad input, one sentence, exit code 2. The rest are events of a run."""

from __future__ import annotations

import errno


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


class FormingFailed(GroupAborted):
    """A group could not be formed, and not because its generation is over."""


class StateUnclear(GroupAborted):
    """Copies of a unit differ and nobody can tell the right one: all drop theirs, and the run goes back.

    Attributes:
        units, workers, nodes: names of the units and of those that held them.
    """

    def __init__(
        self, message: str, units: tuple[str, ...] = (), workers: tuple[str, ...] = (), nodes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.units, self.workers, self.nodes = units, workers, nodes


class GoesBack(GroupAborted):
    """All ranks leave this generation to go back to a checkpoint, because a step was a loss spike."""


class FaultyWorker(RuntimeError):
    """This worker's numbers or state were wrong again and again while those of the others were not; it leaves."""


class Diverged(RuntimeError):
    """Steps do not lead anywhere any more. The message is a sentence; the last good state was saved."""


class CoordinatorLost(RuntimeError):
    """The coordinator was not heard for so long that it is waited for no more. The message is a sentence."""


class Evicted(RuntimeError):
    """The coordinator no longer counts this worker as a member; the process must not touch the run any more."""


_OF_STORAGE = "ENOSPC EDQUOT EROFS EACCES EPERM EIO ESTALE ENOTDIR ENAMETOOLONG ELOOP".split()


def of_storage(error: OSError) -> bool:
    """Whether an error is a file system's, and not that of a network or a process."""
    return error.errno in {getattr(errno, name) for name in _OF_STORAGE}


def reason_of(error: BaseException) -> str:
    """One line about an error; about that of the worker, where Ray Train has wrapped it."""
    error = next(iter(getattr(error, "worker_failures", {}).values()), error)
    return next(iter(str(error).splitlines()), "") or repr(error)
