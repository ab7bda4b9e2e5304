"""Carries out long calls on all ranks of a view at once, while the group's collectives show that each rank gets on.

A call may take minutes: a storage is slow, or hangs. The main thread therefore waits for it in short rounds, and each
round ends with a collective. So a round is progress for the coordinator, a rank that stands still is found, and a newer
view interrupts the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from elastic_moe.checkpoint.bounded import SLICE_S, Activity, Call
from elastic_moe.parallel.collectives.group import Group

T = TypeVar("T")


def together(
    group: Group, action: Callable[[Activity], T], on_round: Callable[[int], None] = lambda _: None
) -> Call[T]:
    """Run an action on every rank until it is done on all of them; collective.

    Args:
        group: the view's collectives.
        action: called as action(activity) in a thread, which is left behind if the generation ends.
        on_round: called after each round with the bytes that all ranks have moved so far.

    Returns:
        This rank's call, which is done.

    Raises:
        GroupAborted: the generation ended.
    """
    call = Call("storage-of-view", action)
    try:
        while True:
            call.wait()
            running, moved = gather(group, int(not call.done), call.activity.moved_bytes).sum(dim=0).tolist()
            if not running:
                return call
            on_round(moved)
    finally:
        call.abandon()


def pause(group: Group, seconds: float) -> None:
    """Wait for about so long on every rank; collective.

    Raises:
        GroupAborted: the generation ended.
    """
    for _ in range(max(1, round(seconds / SLICE_S))):
        time.sleep(SLICE_S)
        group.barrier()


def gather(group: Group, *values: int) -> torch.Tensor:
    """The values of every rank, int64 [R, n]; collective."""
    return group.all_gather(torch.tensor(values, dtype=torch.int64))
