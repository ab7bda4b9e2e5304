"""Processes of tests: forked from servers that have imported what they need, so a start takes milliseconds.

There are two servers, and they fork in turn. Their hash seeds differ, so the processes of a test iterate over sets in
different orders, as processes that were started independently do.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from elastic_moe.environment import environment

CONTEXT = mp.get_context("forkserver")  # of the queues and pipes that processes get
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # of torch, of pyarrow
_servers = [forkserver.ForkServer(), forkserver.ForkServer()]
_turns = itertools.cycle(_servers)


def serve() -> None:
    """Start the servers unless they run. They last as long as this process does."""
    path = os.pathsep.join(place for place in sys.path if place)
    for seed, server in enumerate(_servers, 1):
        with environment({"PYTHONHASHSEED": str(seed), "PYTHONPATH": path} | ONE_THREAD):
            server.set_forkserver_preload(["tests.preload"])
            server.ensure_running()


def start(target: Callable[..., Any], *args: Any, name: str | None = None) -> Any:
    """Start a process that calls `target(*args)` in this process's environment, as it is now."""
    serve()
    process = CONTEXT.Process(target=_begin, args=(dict(os.environ), target, args), name=name)
    forkserver.connect_to_new_process = next(_turns).connect_to_new_process
    process.start()
    return process


def _begin(variables: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import tests.preload  # noqa: F401 # done by the server, which is silent about a failure of it

    os.environ.clear()
    os.environ.update(variables)
    target(*args)
