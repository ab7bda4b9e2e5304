"""What an answer of a cloud's metadata service says: a notice that this machine will be taken, or nothing. Pure.

The forms are those of each provider's documentation:
AWS, interruptions: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
GCP, preemption and host maintenance: https://cloud.google.com/compute/docs/instances/create-use-spot
Azure, scheduled events: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

AWS_NOTICE_S = 120.0
GCP_NOTICE_S = 30.0
GCP_MAINTENANCE_S = 60.0
UNTOLD_S = 30.0  # where a notice names no time, or none that can be read
LEAST_S = 5.0  # Ray ends a node at once whose deadline is past
AZURE_TAKES = ("Preempt", "Terminate")  # the machine does not come back from these


class MetadataError(RuntimeError):
    """The metadata service did not answer, or not as documented. The message is one line."""


@dataclass(frozen=True)
class Answer:
    """An answer of a metadata service.

    Attributes:
        status: the HTTP status.
        body: the text.
        headers: the names are lower case.
    """

    status: int
    body: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Notice:
    """This machine will be taken.

    Attributes:
        text: what the cloud said, in a few words.
        deadline_s: wall-clock time of the machine's end.
    """

    text: str
    deadline_s: float


def aws_instance_action(answer: Answer, now_s: float) -> Notice | None:
    """The notice in `spot/instance-action`, which is not there (404) before."""
    if _absent(answer):
        return None
    told = _mapping(answer)
    action = told.get("action")
    if not isinstance(action, str) or not action:
        raise MetadataError("spot/instance-action names no action")
    return Notice(f"AWS will {action} this spot instance", _until(_iso(told.get("time")), now_s, UNTOLD_S))


def aws_lifecycle(answer: Answer, now_s: float) -> Notice | None:
    """The notice in `autoscaling/target-lifecycle-state` of an instance whose group gives it up."""
    if _absent(answer) or answer.body.strip() != "Terminated":
        return None
    return Notice("its Auto Scaling group terminates this instance", now_s + UNTOLD_S)


def aws_rebalance(answer: Answer, now_s: float) -> Notice | None:
    """The recommendation in `events/recommendations/rebalance`. Many of them are followed by nothing."""
    if _absent(answer):
        return None
    _mapping(answer)
    return Notice("AWS recommends to replace this spot instance", now_s + AWS_NOTICE_S)


def gcp_preempted(answer: Answer, now_s: float) -> Notice | None:
    """The notice in `instance/preempted`. It names no time; the machine has about 30 s."""
    if _choice(answer, ("TRUE", "FALSE")) == "FALSE":
        return None
    return Notice("GCP preempts this instance", now_s + GCP_NOTICE_S)


def gcp_maintenance(answer: Answer, now_s: float) -> Notice | None:
    """The notice in `instance/maintenance-event` of a machine that cannot be moved. A live migration is none."""
    events = ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE")
    if not _choice(answer, events).startswith("TERMINATE"):
        return None
    return Notice("GCP terminates this instance for host maintenance", now_s + GCP_MAINTENANCE_S)


def azure_events(answer: Answer, machine: str, now_s: float) -> Notice | None:
    """The first scheduled event that takes this machine. The list has those of its whole group.

    Args:
        answer: that of `scheduledevents`.
        machine: its name.
        now_s: wall-clock time.
    """
    if answer.status != 200:
        raise MetadataError(f"status {answer.status}")
    listed: Any = _mapping(answer).get("Events")
    if not isinstance(listed, list):
        raise MetadataError("scheduledevents has no list of events")
    found: list[Notice] = []
    for event in cast("list[Any]", listed):
        if not isinstance(event, dict):
            continue
        told = cast("dict[str, Any]", event)
        resources = told.get("Resources")
        names = [str(name).lower() for name in cast("list[Any]", resources if isinstance(resources, list) else [])]
        if told.get("EventType") in AZURE_TAKES and machine.lower() in names:
            at_s = _rfc_date(told.get("NotBefore"))
            found.append(Notice(f"Azure: {told['EventType']} of {machine}", _until(at_s, now_s, UNTOLD_S)))
    return min(found, key=lambda notice: notice.deadline_s, default=None)


def _absent(answer: Answer) -> bool:
    if answer.status not in (200, 404):
        raise MetadataError(f"status {answer.status}")
    return answer.status == 404


def _mapping(answer: Answer) -> dict[str, Any]:
    try:
        told: Any = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"no JSON: {answer.body[:60]!r}") from error
    if not isinstance(told, dict):
        raise MetadataError(f"no JSON object: {answer.body[:60]!r}")
    return cast("dict[str, Any]", told)


def _choice(answer: Answer, choices: tuple[str, ...]) -> str:
    told = answer.body.strip()
    if answer.status != 200 or told not in choices:
        raise MetadataError(f"status {answer.status}, {told[:60]!r}")
    return told


def _iso(told: Any) -> float | None:
    """The time in a date such as `2026-11-28T12:02:00Z`."""
    try:
        at = datetime.fromisoformat(str(told))
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def _rfc_date(told: Any) -> float | None:
    """The time in a date such as `Mon, 19 Sep 2016 18:29:47 GMT`. An event that has begun has an empty one."""
    try:
        return parsedate_to_datetime(str(told)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _until(at_s: float | None, now_s: float, untold_s: float) -> float:
    return max(now_s + LEAST_S, now_s + untold_s if at_s is None else at_s)
