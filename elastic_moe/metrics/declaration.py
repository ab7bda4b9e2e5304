"""The form in which `schema.py` declares the records of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """One key of a record.

    Attributes:
        name: as it stands in the file.
        type: one of `json_schema.TYPES`, or "object" for a key that has keys of its own.
        unit: of the value; "" for a name, a text, an index or a ratio.
        meaning: one sentence.
        optional: whether a record may lack it.
        keys: of an object.
    """

    name: str
    type: str
    unit: str
    meaning: str
    optional: bool = False
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Event:
    """One kind of event.

    Attributes:
        name: value of the key `event`.
        meaning: one sentence.
        keys: beside those that every event has.
    """

    name: str
    meaning: str
    keys: tuple[Key, ...] = ()
