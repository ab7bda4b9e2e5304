"""The codec of the control protocol: every message comes back as it was sent, and nonsense raises ValueError only."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.control import events as ev
from elastic_moe.control import messages as msg
from elastic_moe.control.codec import (
    VersionMismatch,
    decode_from_coordinator,
    decode_from_worker,
    decode_request,
    encode,
)
from elastic_moe.control.message_events import MembershipMessage, event_of_message, event_of_request
from elastic_moe.control.requests import REQUESTS, Request
from elastic_moe.types import Member, View

WORDS = st.text(max_size=8)
WHOLE = st.integers(-(2**40), 2**40)
SCALARS = st.none() | st.booleans() | WHOLE | st.floats(allow_nan=False) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
PAYLOADS = st.dictionaries(WORDS, VALUES, max_size=4)
NAMES = st.lists(WORDS, max_size=3).map(tuple)
MEMBERS = st.builds(Member, WORDS, WORDS, WHOLE, WHOLE, st.booleans(), st.tuples(WORDS, WHOLE))
VIEWS = st.builds(View, WHOLE, st.lists(MEMBERS, max_size=3).map(tuple))
WORKER_MESSAGES = {
    msg.HelloMessage: st.builds(
        msg.HelloMessage, WORDS, WORDS, WORDS, WHOLE, WHOLE, st.booleans(), st.none() | VIEWS, WHOLE, WHOLE
    ),
    msg.ReadyMessage: st.just(msg.ReadyMessage()),
    msg.HeartbeatMessage: st.builds(msg.HeartbeatMessage, WHOLE, WHOLE, WHOLE, st.floats(0, 1e9)),
    msg.SuspectMessage: st.builds(msg.SuspectMessage, WHOLE, WORDS),
    msg.LinksMessage: st.builds(msg.LinksMessage, WHOLE, NAMES, NAMES, NAMES),
    msg.EnteredMessage: st.builds(msg.EnteredMessage, WHOLE, st.none() | PAYLOADS),
    msg.RecordMessage: st.builds(lambda p, step: msg.RecordMessage(p | {"step": step}), PAYLOADS, WHOLE),
    msg.EventMessage: st.builds(lambda p, name: msg.EventMessage(p | {"event": name}), PAYLOADS, WORDS),
    msg.ShardMessage: st.builds(lambda p, step: msg.ShardMessage(p | {"step": step}), PAYLOADS, WHOLE),
    msg.HeldMessage: st.builds(msg.HeldMessage, WHOLE, WORDS),
    msg.FinishedMessage: st.just(msg.FinishedMessage()),
    msg.FailingMessage: st.builds(msg.FailingMessage, WORDS),
    msg.LeftMessage: st.just(msg.LeftMessage()),
}
COORDINATOR_MESSAGES = {
    msg.WelcomeMessage: st.just(msg.WelcomeMessage()),
    msg.AliveMessage: st.builds(msg.AliveMessage, st.floats(0, 1e9), WHOLE),
    msg.ViewMessage: st.builds(msg.ViewMessage, VIEWS, st.booleans(), WORDS, st.tuples(WORDS, WHOLE), st.booleans()),
    msg.ViewChangeMessage: st.builds(
        msg.ViewChangeMessage,
        WHOLE,
        WHOLE,
        st.lists(WHOLE, max_size=3).map(tuple),
        st.lists(MEMBERS, max_size=3).map(tuple),
        st.booleans(),
        WORDS,
        st.tuples(WORDS, WHOLE),
        st.booleans(),
    ),
    msg.PauseMessage: st.builds(msg.PauseMessage, WHOLE, WORDS),
    msg.ProbeMessage: st.just(msg.ProbeMessage()),
    msg.CheckLinksMessage: st.builds(msg.CheckLinksMessage, WHOLE, st.lists(MEMBERS, max_size=3).map(tuple)),
    msg.ReleaseMessage: st.just(msg.ReleaseMessage()),
    msg.EvictedMessage: st.builds(msg.EvictedMessage, WORDS),
    msg.SaveMessage: st.builds(msg.SaveMessage, WHOLE),
    msg.StopMessage: st.just(msg.StopMessage()),
}
FROM_WORKER, FROM_COORDINATOR = st.one_of(*WORKER_MESSAGES.values()), st.one_of(*COORDINATOR_MESSAGES.values())
MESSAGES = FROM_WORKER | FROM_COORDINATOR


def test_every_message_has_a_name_and_is_tested() -> None:
    assert set(WORKER_MESSAGES) == set(msg.FROM_WORKER.values()) == set(get_args(msg.WorkerMessage))
    assert set(COORDINATOR_MESSAGES) == set(msg.FROM_COORDINATOR.values()) == set(get_args(msg.CoordinatorMessage))
    assert set(REQUESTS.values()) == set(get_args(Request))


@settings(max_examples=300, deadline=None)
@given(FROM_WORKER)
def test_a_workers_message_comes_back(message: msg.WorkerMessage) -> None:
    line = encode(message)
    assert line.index(b"\n") == len(line) - 1
    assert decode_from_worker(line) == message


@settings(max_examples=200, deadline=None)
@given(FROM_COORDINATOR)
def test_the_coordinators_message_comes_back(message: msg.CoordinatorMessage) -> None:
    assert decode_from_coordinator(encode(message)) == message


def _decode_with_all(line: bytes) -> None:
    """Decode a line in every way; only ValueError may come out, and what comes out is encodable again."""
    for decode in (decode_from_worker, decode_from_coordinator):
        try:
            message = decode(line)
        except ValueError:
            continue
        assert decode(encode(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_are_refused(line: bytes) -> None:
    for decode in (decode_from_worker, decode_from_coordinator):
        with pytest.raises(ValueError, match=r"[a-z]"):
            decode(line)


@settings(max_examples=500, deadline=None)
@given(MESSAGES, st.data())
def test_a_mutated_value_raises_nothing_but_value_error(message: Any, data: st.DataObject) -> None:
    values = json.loads(encode(message))
    path = data.draw(st.sampled_from(list(_paths(values))))
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[path[-1]]
    else:
        inner[path[-1]] = data.draw(VALUES | st.just(10**400))
    _decode_with_all(json.dumps(values).encode())


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_line_raises_nothing_but_value_error(message: Any, at: int, new: bytes, removed: int) -> None:
    line = encode(message)
    at %= len(line)
    _decode_with_all(line[:at] + new + line[at + removed :])


def _paths(values: Any, path: tuple[Any, ...] = ()) -> Any:
    """The path of every value inside."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


HELLO = {"type": "hello", "version": msg.VERSION, "token": "t", "worker": "w", "node": "n", "pid": 1}
VIEW = {"generation": 3, "members": [{"worker": "w", "node": "n", "pid": 1}]}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], r"must be a JSON object, not \[\]"),
        ({}, "field 'type' must be one of hello, ready, .*, not None"),
        ({"type": ["hello"]}, "field 'type' must be one of"),
        ({"type": "ready", "x": 1}, "message 'ready': field 'x' is unknown"),
        ({"type": "heartbeat", "generation": 1, "step": 2}, "message 'heartbeat': field 'progress' is missing"),
        ({"type": "suspect", "generation": "1", "error": ""}, "field 'generation' must be a whole number, not '1'"),
        ({"type": "suspect", "generation": True, "error": ""}, "field 'generation' must be a whole number, not True"),
        ({"type": "record", "record": {"loss": 1.0}}, "message 'record': field 'record' must have 'step'"),
        ({"type": "event", "event": {"step": 1}}, "field 'event' must have 'event', a text"),
        (HELLO | {"view": VIEW | {"members": [{"worker": "w"}]}}, r"field 'view.members\[0\].node' is missing"),
        (HELLO | {"view": VIEW | {"members": 5}}, "field 'view.members' must be a list, not 5"),
        (HELLO | {"view": [1]}, r"field 'view' must be an object, not \[1\]"),
    ],
)
def test_the_sentence_names_the_field(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decode_from_worker(json.dumps(values).encode())


def test_numbers_that_json_lacks_are_refused_where_a_number_counts_and_kept_in_payloads() -> None:
    for seconds in ("NaN", "Infinity", "1e999", "1" + 400 * "0"):
        line = json.dumps(HELLO | {"placed_s": "?"}).replace('"?"', seconds)
        with pytest.raises(ValueError, match=r"placed_s' must be a finite number"):
            decode_from_worker(line.encode())
    message = decode_from_worker(encode(msg.RecordMessage({"step": 1, "loss": float("nan")})))
    assert isinstance(message, msg.RecordMessage)
    assert math.isnan(message.record["loss"])


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nested"):
        decode_from_worker(b"[" * 200_000)


def test_a_payload_that_json_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(TypeError):
        encode(msg.RecordMessage({"step": 1, "loss": object()}))


@pytest.mark.parametrize("version", [None, 0, msg.VERSION + 1, "1"])
def test_another_version_is_named_whatever_its_fields(version: Any) -> None:
    hello = {"type": "hello", "version": version, "field_of_tomorrow": 1}
    with pytest.raises(VersionMismatch, match=r"the worker speaks version .* install the same release"):
        decode_from_worker(json.dumps(hello).encode())
    with pytest.raises(VersionMismatch, match=r"the coordinator speaks version .* install the same release"):
        decode_from_coordinator(json.dumps(hello | {"type": "welcome"}).encode())


def test_a_hello_without_a_version_is_of_another_version() -> None:
    with pytest.raises(VersionMismatch, match="version 0"):
        decode_from_worker(b'{"type": "hello", "token": "t", "worker": "w", "node": "n", "pid": 1}')


def test_the_token_does_not_show_in_a_hello() -> None:
    assert "secret" not in repr(msg.HelloMessage("secret", "w", "n", 1))


@pytest.mark.parametrize(
    ("values", "event"),
    [
        ({"event": "drain", "worker": "w"}, ev.Drain("w", "", 0.0, "drain")),
        ({"event": "drain", "node": "n", "deadline_s": 30}, ev.Drain("", "n", 30.0, "drain")),
        ({"event": "worker_lost", "worker": "w", "node": "n", "pid": 7, "reason": "r"}, ev.Lost("w", "r")),
        ({"event": "node_lost", "node": "n"}, ev.NodeLost("n", "node_lost")),
        ({"event": "stop", "reason": "Ctrl-C"}, ev.Stop("Ctrl-C")),
    ],
)
def test_requests_become_events(values: dict[str, Any], event: ev.Event) -> None:
    assert event_of_request(decode_request(values)) == event


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, f"field 'event' must be one of {', '.join(REQUESTS)}, not None"),
        ({"event": "explode"}, "not 'explode'"),
        ({"event": "worker_lost"}, "message 'worker_lost': field 'worker' is missing"),
        ({"event": "drain", "deadline": 3}, "message 'drain': field 'deadline' is unknown"),
        ({"event": "drain", "deadline_s": "soon"}, "field 'deadline_s' must be a finite number, not 'soon'"),
    ],
)
def test_a_malformed_request_is_refused_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decode_request(values)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["event", "worker", "node", "deadline_s", "reason"]), VALUES))
def test_any_mapping_is_a_request_or_a_value_error(values: dict[str, Any]) -> None:
    try:
        request = decode_request(values)
    except ValueError:
        return
    assert type(request) in REQUESTS.values()


def test_messages_become_events() -> None:
    view = View(4, (Member("w", "n", 7),))
    hello = msg.HelloMessage("t", "w", "n", 7, 3, ready=True, view=view, entered=4, step=9)
    pairs: list[tuple[MembershipMessage, ev.Event]] = [
        (hello, ev.Hello("w", "n", 7, 3, True, view, 4, 9)),
        (msg.HelloMessage("t", "w", "n", 7, node_kind="spot/gpus"), ev.Hello("w", "n", 7, on_spot=True)),
        (msg.HelloMessage("t", "w", "n", 7, node_kind="on-demand/gpus"), ev.Hello("w", "n", 7)),
        (msg.ReadyMessage(), ev.Ready("w")),
        (msg.HeartbeatMessage(4, 9, 30), ev.Heartbeat("w", 4, 9, 30)),
        (msg.SuspectMessage(4, "reset"), ev.Suspect("w", 4, "reset")),
        (msg.EnteredMessage(4, {}), ev.Entered("w", 4)),
        (msg.FinishedMessage(), ev.Finished("w")),
        (msg.FailingMessage("out of memory"), ev.Lost("w", "out of memory")),
        (msg.LeftMessage(), ev.Left("w")),
    ]
    for message, event in pairs:
        assert event_of_message("w", message) == event
