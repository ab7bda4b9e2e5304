"""Forming a group blocks in native code, which no flag wakes: it goes on in a thread, and the caller looks at flags."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from elastic_moe.parallel.collectives.backend import SLICE_S, BackendError

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str, check: Callable[[], None]) -> T:
    """The result of `work`. Between slices of waiting, and at the end, `check` may raise, which ends the wait at once.

    The thread is no daemon: the interpreter must not end while native code is going to return into it.

    Raises:
        BackendError: `work` raised RuntimeError or OSError.
    """
    done = threading.Event()
    result: list[T] = []
    errors: list[RuntimeError | OSError] = []

    def run() -> None:
        try:
            result.append(work())
        except (RuntimeError, OSError) as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name=name, daemon=False).start()
    while not done.wait(SLICE_S):
        check()
    check()
    if errors:
        raise BackendError(str(errors[0])) from errors[0]
    return result[0]
