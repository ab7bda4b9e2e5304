"""Runs a call in a thread of its own, so that its caller can leave it behind.

A read or write on a hanging network file system cannot be interrupted. So the caller waits for a thread while the call
gets on. When it stands still for too long, the caller goes on without it. The thread ends whenever the call returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

SLICE_S = 0.25  # one wait for a call's thread
T = TypeVar("T")


class Abandoned(RuntimeError):
    """The caller has gone on without this call. It is raised in the call's thread, to end it."""


class Activity:
    """Progress of one call: its thread tells, its caller reads.

    Attributes:
        moved_bytes: bytes read, written or hashed so far.
        abandoned: the caller has gone on without the call.
    """

    def __init__(self) -> None:
        self.moved_bytes = 0
        self.abandoned = False

    def moved(self, count: int) -> None:
        """The call got on by so many bytes.

        Raises:
            Abandoned: nobody waits for the result any more.
        """
        self.moved_bytes += count
        if self.abandoned:
            raise Abandoned


class Call(Generic[T]):
    """One call under way.

    Args:
        name: of the thread.
        action: called as action(activity) in the thread; tells `activity` whenever it gets on.

    Attributes:
        activity: how far it has come.
        silent_s: seconds for which its caller has waited without any progress.
    """

    def __init__(self, name: str, action: Callable[[Activity], T]) -> None:
        self.activity = Activity()
        self.silent_s = 0.0
        self._seen = 0
        self._done = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(action,), name=name, daemon=True).start()

    def _run(self, action: Callable[[Activity], T]) -> None:
        try:
            self._value.append(action(self.activity))
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller
            self._error = error
        finally:
            self._done.set()

    @property
    def done(self) -> bool:
        """The call has returned or failed."""
        return self._done.is_set()

    def wait(self, slice_s: float = SLICE_S) -> bool:
        """Wait for the end, at most `slice_s`. Returns whether it is done.

        The silence is counted in waits, not by a clock: a process that was stopped for a while has not waited.
        """
        if self._done.wait(slice_s):
            return True
        moved = self.activity.moved_bytes
        self.silent_s = self.silent_s + slice_s if moved == self._seen else 0.0
        self._seen = moved
        return False

    def result(self) -> T:
        """The action's value, once the call is done; raises what the action raised."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def abandon(self) -> None:
        """Go on without the call. Its thread ends as soon as it gets on."""
        self.activity.abandoned = True


_hanging: dict[str, Call[object]] = {}  # place -> a call that was left behind there, in this process
_lock = threading.Lock()


def bounded(place: str, action: Callable[[Activity], T], timeout_s: float, outer: Activity | None = None) -> T:
    """Run a call, and wait for it as long as it gets on.

    While a call that was left behind hangs, no other one is begun at the same place. So a storage that hangs for hours
    holds few threads, and answers at once that it hangs.

    Args:
        place: the storage that is called.
        action: called as action(activity) in a thread; tells `activity` whenever it gets on.
        timeout_s: seconds without progress after which the call is left behind.
        outer: the activity of the call in whose thread this one is made; it gets on as this one does.

    Raises:
        TimeoutError: the call made no progress for `timeout_s`, or an earlier one hangs.
        Abandoned: the outer call was left behind.
    """
    with _lock:
        earlier = _hanging.get(place)
        if earlier is not None and not earlier.done:
            raise TimeoutError(f"{place} hangs: an earlier call has not returned yet")
        _hanging.pop(place, None)
    call, seen = Call("storage", action), 0
    try:
        while not call.wait(SLICE_S):
            moved = call.activity.moved_bytes
            if outer is not None:
                outer.moved(moved - seen)
            seen = moved
            if call.silent_s >= timeout_s:
                raise TimeoutError(f"{place} did not answer for {timeout_s:g} s")
    except (Abandoned, TimeoutError):
        call.abandon()
        with _lock:
            _hanging[place] = call  # type: ignore[assignment] # only asked whether it is done
        raise
    if outer is not None:
        outer.moved(call.activity.moved_bytes - seen)
    return call.result()
