"""A view told as a change is the view itself, or the change is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.config.pace import pace
from elastic_moe.control.messages import ViewMessage
from elastic_moe.control.view_changes import change_between, changed
from elastic_moe.types import Member, View

STORE = ("127.0.0.1", 7)


def _message(generation: int, members: list[Member], **more: bool) -> ViewMessage:
    return ViewMessage(
        View(generation, tuple(members)), more.get("planned", False), "why", STORE, more.get("hold", False)
    )


def _members(*numbers: int) -> list[Member]:
    return [Member(f"w{n}", f"n{n // 4}", n) for n in numbers]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 40), unique=True), st.booleans(), st.booleans()
)
def test_a_change_gives_the_view_or_is_not_made(old: list[int], new: list[int], planned: bool, hold: bool) -> None:
    before = _message(3, _members(*old))
    after = _message(5, _members(*new), planned=planned, hold=hold)
    change = change_between(before, after)
    if change is not None:
        assert changed(before, change) == after
        assert len(change.removed) + len(change.added) <= len(new) // 2


def test_deaths_and_joins_among_many_are_told_as_changes() -> None:
    before = _message(3, _members(*range(1000)))
    after = _message(4, _members(*(n for n in range(1000) if n % 100), 1000, 1001))
    change = change_between(before, after)
    assert change is not None
    assert change.removed == tuple(range(0, 1000, 100))
    assert [member.worker for member in change.added] == ["w1000", "w1001"]
    assert changed(before, change) == after


def test_a_member_that_is_another_now_is_told_anew() -> None:
    drained = [Member(m.worker, m.node, m.pid, draining=m.pid == 9) for m in _members(*range(10))]
    change = change_between(_message(3, _members(*range(10))), _message(4, drained))
    assert change is not None
    assert changed(_message(3, _members(*range(10))), change).view.members == tuple(drained)
    first = [Member(m.worker, m.node, m.pid, draining=m.pid == 0) for m in _members(*range(10))]
    assert change_between(_message(3, _members(*range(10))), _message(4, first)) is None, "it would get another rank"


def test_a_change_of_another_view_is_refused() -> None:
    before, after = _message(3, _members(*range(8))), _message(4, _members(*range(7)))
    change = change_between(before, after)
    assert change is not None
    for wrong in (None, _message(2, _members(*range(8))), after):
        with pytest.raises(ValueError, match="generation 4 is told as a change of 3"):
            changed(wrong, change)


def test_a_change_without_members_that_the_view_does_not_have_is_refused() -> None:
    change = change_between(_message(3, _members(*range(8))), _message(4, _members(*range(7))))
    assert change is not None
    with pytest.raises(ValueError, match="does not have"):
        changed(_message(3, _members(*range(7))), change)


@settings(deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 12), min_size=6), min_size=2, max_size=6), st.data())
def test_changes_that_are_lost_repeated_or_out_of_order_give_the_right_view_or_none(
    members: list[frozenset[int]], data: st.DataObject
) -> None:
    views = [_message(2 * i + 1, _members(*sorted(numbers))) for i, numbers in enumerate(members)]
    told = [change_between(before, after) or after for before, after in pairwise(views)]
    known: ViewMessage | None = views[0]
    for i in data.draw(st.lists(st.integers(0, len(told) - 1), max_size=8)):
        message = told[i]
        if isinstance(message, ViewMessage):
            known = message
            continue
        try:
            known = changed(known, message)
        except ValueError:
            known = None  # a new connection, which begins with no view
        assert known is None or known == views[i + 1]


def test_the_pace_follows_the_number_of_members() -> None:
    assert [pace(0.5, members) for members in (0, 64, 300, 600, 10_000)] == [0.5, 0.5, 0.5, 1.0, 1.5]
