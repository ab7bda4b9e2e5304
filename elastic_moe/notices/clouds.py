"""The metadata services of AWS, GCP and Azure: how each is recognised, and how its notice is polled."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Protocol

from elastic_moe.notices import answers
from elastic_moe.notices.answers import Answer, MetadataError, Notice
from elastic_moe.notices.metadata import MetadataClient


class Cloud(Protocol):
    """A provider whose metadata service tells of this machine's end."""

    name: str

    def recognised(self) -> bool:
        """Whether the service is this provider's."""
        ...

    def poll(self, wait_s: float) -> Notice | None:
        """The notice, if there is one. A service that can wait for a change does so for `wait_s`.

        Raises:
            MetadataError: the service did not tell.
        """
        ...


def _answers_with_200(ask: Callable[[], Answer]) -> Answer | None:
    try:
        answer = ask()
    except MetadataError:
        return None
    return answer if answer.status == 200 and answer.body.strip() else None


class Aws:
    """EC2's service, version 2: every question shows a token, which a PUT brings.

    Args:
        client: asks.
        on_rebalance: a recommendation to replace the instance is a notice too.
    """

    name = "aws"
    _TOKEN_LIFE_S = 21600
    _BASE = "/latest/meta-data"

    def __init__(self, client: MetadataClient, on_rebalance: bool = False) -> None:
        self._client, self._on_rebalance = client, on_rebalance
        self._token = ""

    def recognised(self) -> bool:
        answer = _answers_with_200(self._ask_token)
        return answer is not None

    def poll(self, wait_s: float) -> Notice | None:
        del wait_s  # it cannot wait
        questions = {"spot/instance-action": answers.aws_instance_action}
        questions["autoscaling/target-lifecycle-state"] = answers.aws_lifecycle
        if self._on_rebalance:
            questions["events/recommendations/rebalance"] = answers.aws_rebalance
        for path, reads in questions.items():
            if notice := reads(self._get(f"{self._BASE}/{path}"), time.time()):
                return notice
        return None

    def _get(self, path: str) -> Answer:
        """The answer, with a new token where the old one has expired."""
        if self._token:
            answer = self._client.ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if answer.status != 401:
                return answer
        token = self._ask_token()
        if token.status != 200:
            raise MetadataError(f"a token was refused with status {token.status}")
        self._token = token.body.strip()
        return self._client.ask("GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _ask_token(self) -> Answer:
        life = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._TOKEN_LIFE_S)}
        return self._client.ask("PUT", "/latest/api/token", life)


class Gcp:
    """Compute Engine's service. It holds an answer back until the value changes, so nothing of the 30 s is lost."""

    name = "gcp"
    _BASE = "/computeMetadata/v1/instance"
    _HEADERS: Mapping[str, str] = {"Metadata-Flavor": "Google"}

    def __init__(self, client: MetadataClient) -> None:
        self._client = client
        self._asked_before = False
        self._etag = ""

    def recognised(self) -> bool:
        answer = _answers_with_200(lambda: self._client.ask("GET", f"{self._BASE}/id", self._HEADERS))
        return answer is not None and answer.headers.get("metadata-flavor") == "Google"

    def poll(self, wait_s: float) -> Notice | None:
        wait_s = max(1, round(wait_s)) if self._asked_before else 0
        query = {"wait_for_change": "true", "timeout_sec": str(wait_s)} if wait_s else {}
        if wait_s and self._etag:
            query["last_etag"] = self._etag
        path = f"{self._BASE}/preempted" + ("?" + urllib.parse.urlencode(query) if query else "")
        answer = self._client.ask("GET", path, self._HEADERS, patience_s=wait_s)
        if notice := answers.gcp_preempted(answer, time.time()):
            return notice
        self._asked_before, self._etag = True, answer.headers.get("etag", "")
        answer = self._client.ask("GET", f"{self._BASE}/maintenance-event", self._HEADERS)
        return answers.gcp_maintenance(answer, time.time())


class Azure:
    """Azure's service. Its list of events has those of other machines too, so it is asked for this one's name."""

    name = "azure"
    _HEADERS: Mapping[str, str] = {"Metadata": "true"}
    _NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    _EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"

    def __init__(self, client: MetadataClient) -> None:
        self._client = client
        self._machine = ""

    def recognised(self) -> bool:
        return _answers_with_200(self._ask_name) is not None

    def poll(self, wait_s: float) -> Notice | None:
        del wait_s  # it cannot wait
        if not self._machine:
            answer = self._ask_name()
            if answer.status != 200 or not answer.body.strip():
                raise MetadataError(f"the machine's name: status {answer.status}")
            self._machine = answer.body.strip()
        answer = self._client.ask("GET", self._EVENTS, self._HEADERS)
        return answers.azure_events(answer, self._machine, time.time())

    def _ask_name(self) -> Answer:
        return self._client.ask("GET", self._NAME, self._HEADERS)


def clouds(client: MetadataClient, on_rebalance: bool = False) -> dict[str, Cloud]:
    """All providers, by name."""
    known: tuple[Cloud, ...] = (Aws(client, on_rebalance), Gcp(client), Azure(client))
    return {cloud.name: cloud for cloud in known}
