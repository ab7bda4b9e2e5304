"""A view told by what differs from the one before: a death among a thousand members is a line, not a list. Pure."""

from __future__ import annotations

from elastic_moe.control.messages import ViewChangeMessage, ViewMessage
from elastic_moe.types import View


def change_between(before: ViewMessage, after: ViewMessage) -> ViewChangeMessage | None:
    """What turns one view into the next, or None where telling the whole view is as short.

    Members that stay must keep their order and their facts, and new ones must follow them.
    """
    old, new = before.view.members, after.view.members
    staying = set(new)
    removed = tuple(rank for rank, member in enumerate(old) if member not in staying)
    kept = tuple(member for member in old if member in staying)
    added = new[len(kept) :]
    if new[: len(kept)] != kept or len(removed) + len(added) > len(new) // 2:
        return None
    generation = after.view.generation
    return ViewChangeMessage(
        before.view.generation, generation, removed, added, after.planned, after.reason, after.store, after.hold
    )


def changed(before: ViewMessage | None, change: ViewChangeMessage) -> ViewMessage:
    """The view that `change_between` was made for.

    Raises:
        ValueError: `before` is not the view that it was made from, as far as that can be seen.
    """
    if before is None or before.view.generation != change.base:
        raise ValueError(
            f"generation {change.generation} is told as a change of {change.base}, which is not known here"
        )
    gone = set(change.removed)
    if not gone <= set(range(before.view.world_size)):
        raise ValueError(f"generation {change.generation} lacks ranks that generation {change.base} does not have")
    kept = tuple(member for rank, member in enumerate(before.view.members) if rank not in gone)
    view = View(change.generation, kept + change.added)
    return ViewMessage(view, change.planned, change.reason, change.store, change.hold)
