"""The one codec of `control/messages.py` and `control/peer_messages.py`: a message is one JSON object on one line.

The key "type" names the message (a request has "event" instead). The other keys are the fields of the value, and a
field with a default may be absent. A tuple becomes a list, a dataclass an object. A line that is no message raises
ValueError, and its sentence names the message and the field.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from elastic_moe.control.messages import (
    FROM_COORDINATOR,
    FROM_WORKER,
    NAMES,
    VERSION,
    CoordinatorMessage,
    WorkerMessage,
)
from elastic_moe.control.peer_messages import (
    LINKS,
    PEER_NAMES,
    RENDEZVOUS,
    LinkedMessage,
    LinkMessage,
    MeetMessage,
    MetMessage,
)
from elastic_moe.control.requests import REQUESTS, Request

T = TypeVar("T")
_TOKEN = re.compile(rb'\s*\{\s*"type"\s*:\s*"\w+"\s*,\s*"token"\s*:\s*("(?:[^"\\]|\\.)*")')
GREETINGS = {"hello": "the worker", "welcome": "the coordinator", "meet": "a member of the group", "link": "a worker"}
ALL_NAMES = {**NAMES, **PEER_NAMES}
PLAIN = {str: "a text", int: "a whole number", bool: "true or false", float: "a finite number"}


Message = WorkerMessage | CoordinatorMessage | MeetMessage | MetMessage | LinkMessage | LinkedMessage


class VersionMismatch(ValueError):
    """The peer speaks another version of the protocol."""


def encode(message: Message) -> bytes:
    """The message as a line, with its line break.

    Raises:
        TypeError: a payload holds something that JSON does not have.
    """
    values = {"type": ALL_NAMES[type(message)]} | _object(message)
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def decode_from_worker(line: bytes) -> WorkerMessage:
    """The message of a worker.

    Raises:
        VersionMismatch: a `hello` of another version of the protocol.
        ValueError: the line is no such message.
    """
    return _decode(line, FROM_WORKER)


def decode_from_coordinator(line: bytes) -> CoordinatorMessage:
    """The message of the coordinator; raises as `decode_from_worker` does, of a `welcome`."""
    return _decode(line, FROM_COORDINATOR)


def decode_rendezvous(line: bytes) -> MeetMessage | MetMessage:
    """The message of a member of a group that forms, or the answer to it; raises as above, of a `meet`."""
    return _decode(line, RENDEZVOUS)


def decode_link(line: bytes) -> LinkMessage | LinkedMessage:
    """The message of a worker that tries its link, or the answer to it; raises as above, of a `link`."""
    return _decode(line, LINKS)


def token_of(head: bytes) -> str | None:
    """The token in the first bytes of a connection's first message, or None if it is not there.

    The token comes right after the message's type. So a stranger is known before the rest of the line is read.
    """
    found = _TOKEN.match(head)
    try:
        return None if found is None else str(json.loads(found[1]))
    except ValueError:
        return None


def decode_request(values: Mapping[str, Any]) -> Request:
    """The request in a mapping: {"event": "drain" | "worker_lost" | "node_lost" | "stop" | "fail", and its fields}.

    Raises:
        ValueError: the mapping is no request.
    """
    return _message(values, "event", REQUESTS)


def _decode(line: bytes, table: Mapping[str, type[T]]) -> T:
    """The message in a line. A version comes first: another version may have other fields."""
    try:
        values = json.loads(line.decode())
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a message must be a JSON object, not {reprlib.repr(values)}")
    values = cast("dict[str, Any]", values)
    name, version = values.get("type"), values.get("version", 0)
    if isinstance(name, str) and name in table and name in GREETINGS and version != VERSION:
        raise VersionMismatch(
            f"{GREETINGS[name]} speaks version {reprlib.repr(version)} of the control protocol and this process "
            f"version {VERSION}: install the same release of elastic_moe on every node"
        )
    return _message(values, "type", table)


def _message(values: Mapping[str, Any], key: str, table: Mapping[str, type[T]]) -> T:
    name = values.get(key)
    cls = table.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(table)
        raise ValueError(f"field {key!r} must be one of {known}, not {reprlib.repr(name)}")
    try:
        return _build(cls, {k: v for k, v in values.items() if k != key}, "")
    except ValueError as error:
        raise ValueError(f"message {name!r}: {error}") from None


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


@cache
def _required(cls: type) -> tuple[str, ...]:
    """Fields without a default."""
    return tuple(f.name for f in fields(cast("Any", cls)) if f.default is MISSING and f.default_factory is MISSING)


def _build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """A dataclass from an object. `path`: where the object is, with a dot at the end."""
    hints = _hints(cls)
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(f"field {path + unknown[0]!r} is unknown")
    if missing := [name for name in _required(cls) if name not in values]:
        raise ValueError(f"field {path + missing[0]!r} is missing")
    return cls(**{name: _read(hints[name], value, path + name) for name, value in values.items()})


def _read(hint: Any, value: Any, path: str) -> Any:
    """The value of a field. `hint`: the field's type."""
    if hint is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither infinite nor NaN
        return float(_expect(fits, PLAIN[float], value, path))
    if type(value) is hint:  # nearly every field: a thousand heartbeats a second are read so
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:  # the only unions are of a type and None
        return None if value is None else _read(arguments[0], value, path)
    if origin is tuple:
        return _read_tuple(arguments, value, path)
    if origin is not None:  # a payload: any object
        return _expect(isinstance(value, dict), "an object", value, path)
    if is_dataclass(hint):
        _expect(isinstance(value, dict), "an object", value, path)
        return _build(cast("type[Any]", hint), value, path + ".")
    return _expect(False, PLAIN[hint], value, path)


def _read_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    """A tuple from a list, of one type (`tuple[X, ...]`) or of one type for each place."""
    _expect(isinstance(value, list), "a list", value, path)
    hints = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
    _expect(len(value) == len(hints), f"a list of {len(hints)}", value, path)
    return tuple(_read(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _expect(fits: bool, kind: str, value: Any, path: str) -> Any:
    if not fits:
        raise ValueError(f"field {path!r} must be {kind}, not {reprlib.repr(value)}")
    return value


def _object(value: Any) -> dict[str, Any]:
    """A dataclass as an object."""
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _object(value)
    return [_plain(v) for v in cast("tuple[Any, ...]", value)] if isinstance(value, tuple) else value
