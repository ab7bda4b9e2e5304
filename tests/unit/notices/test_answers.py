"""What an answer of a cloud says: a notice with its deadline, nothing, or an answer that is not as documented."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.notices import answers
from elastic_moe.notices.answers import Answer, MetadataError, Notice

NOW_S = datetime(2026, 11, 28, 12, 0, 0, tzinfo=UTC).timestamp()
Reads = Callable[[Answer, float], Notice | None]


def ok(body: str) -> Answer:
    return Answer(200, body, {})


def azure(answer: Answer, now_s: float) -> Notice | None:
    return answers.azure_events(answer, "Worker_3", now_s)


READS: dict[str, Reads] = {
    "action": answers.aws_instance_action,
    "lifecycle": answers.aws_lifecycle,
    "rebalance": answers.aws_rebalance,
    "preempted": answers.gcp_preempted,
    "maintenance": answers.gcp_maintenance,
    "azure": azure,
}
ABSENT = Answer(404, "", {})


def events(**changes: object) -> Answer:
    event = {
        "EventId": "A", "EventType": "Preempt", "ResourceType": "VirtualMachine", "Resources": ["other", "worker_3"],
        "EventStatus": "Scheduled", "NotBefore": "Sat, 28 Nov 2026 12:00:31 GMT",
    }  # fmt: skip
    return ok(json.dumps({"DocumentIncarnation": 1, "Events": [event | changes]}))


@pytest.mark.parametrize(
    ("name", "answer", "words", "left_s"),
    [
        ("action", ok('{"action": "terminate", "time": "2026-11-28T12:02:00Z"}'), "terminate", 120.0),
        ("action", ok('{"action": "stop", "time": "2026-11-28T12:01:00Z"}'), "stop", 60.0),
        ("action", ok('{"action": "hibernate", "time": "2026-11-28T11:00:00Z"}'), "hibernate", 5.0),  # it is past
        ("action", ok('{"action": "terminate", "time": "soon"}'), "terminate", 30.0),
        ("action", ok('{"action": "terminate"}'), "terminate", 30.0),
        ("lifecycle", ok("Terminated\n"), "Auto Scaling", 30.0),
        ("rebalance", ok('{"noticeTime": "2026-11-28T11:59:00Z"}'), "recommends", 120.0),
        ("preempted", ok("TRUE"), "preempts", 30.0),
        ("maintenance", ok("TERMINATE_ON_HOST_MAINTENANCE"), "maintenance", 60.0),
        ("azure", events(), "Preempt of Worker_3", 31.0),
        ("azure", events(EventType="Terminate"), "Terminate of Worker_3", 31.0),
        ("azure", events(NotBefore="", EventStatus="Started"), "Preempt", 30.0),
        ("azure", events(NotBefore=None), "Preempt", 30.0),
    ],
)
def test_a_notice_and_its_deadline(name: str, answer: Answer, words: str, left_s: float) -> None:
    notice = READS[name](answer, NOW_S)
    assert notice is not None
    assert words in notice.text
    assert notice.deadline_s == NOW_S + left_s


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("action", ABSENT),
        ("lifecycle", ABSENT),
        ("lifecycle", ok("InService")),
        ("rebalance", ABSENT),
        ("preempted", ok("FALSE")),
        ("maintenance", ok("NONE")),
        ("maintenance", ok("MIGRATE_ON_HOST_MAINTENANCE")),
        ("azure", ok('{"Events": []}')),
        ("azure", events(Resources=["worker_30"])),
        ("azure", events(Resources=None)),
        ("azure", events(EventType="Freeze")),
        ("azure", events(EventType="Reboot")),
        ("azure", ok('{"Events": ["odd"]}')),
    ],
)
def test_no_notice(name: str, answer: Answer) -> None:
    assert READS[name](answer, NOW_S) is None


@pytest.mark.parametrize("name", [name for name in READS if name != "lifecycle"])
@pytest.mark.parametrize("body", ["", "<html>", "[]", "3", '{"Events": 3}', "[" * 100_000])
def test_an_answer_that_is_not_as_documented(name: str, body: str) -> None:
    if name == "rebalance" and body.startswith("{"):
        return  # any JSON object is a recommendation
    with pytest.raises(MetadataError):
        READS[name](ok(body), NOW_S)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("status", [401, 403, 429, 500, 503, 302])
def test_a_status_that_tells_nothing(name: str, status: int) -> None:
    with pytest.raises(MetadataError, match=str(status)):
        READS[name](Answer(status, '{"action": "terminate"}', {}), NOW_S)


def test_the_soonest_of_several_events_counts() -> None:
    told = [json.loads(events(NotBefore=f"Sat, 28 Nov 2026 12:0{m}:00 GMT").body)["Events"][0] for m in (9, 2, 5)]
    notice = azure(ok(json.dumps({"Events": told})), NOW_S)
    assert notice is not None
    assert notice.deadline_s == NOW_S + 120.0


@given(st.sampled_from(sorted(READS)), st.integers(100, 599), st.text() | st.from_type(dict).map(str))
def test_any_answer_is_a_notice_nothing_or_a_metadata_error(name: str, status: int, body: str) -> None:
    with suppress(MetadataError):
        notice = READS[name](Answer(status, body, {}), NOW_S)
        assert notice is None or notice.deadline_s >= NOW_S + answers.LEAST_S


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["Events", "EventType", "Resources", "NotBefore", "action", "time"]), x)))  # fmt: skip
def test_any_json_is_a_notice_nothing_or_a_metadata_error(told: object) -> None:
    for reads in READS.values():
        with suppress(MetadataError):
            reads(ok(json.dumps(told)), NOW_S)
