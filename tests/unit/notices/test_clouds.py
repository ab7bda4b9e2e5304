"""The three clouds against local servers that answer like them: recognised, polled, and survived when they fail."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from elastic_moe.errors import UserError
from elastic_moe.notices.answers import MetadataError
from elastic_moe.notices.clouds import Cloud, clouds
from elastic_moe.notices.metadata import MetadataClient
from tests.metadata_server import FakeCloud, metadata_server

PROVIDERS = ("aws", "gcp", "azure")


@pytest.fixture(params=PROVIDERS)
def fake(request: pytest.FixtureRequest) -> Iterator[FakeCloud]:
    with metadata_server(request.param) as cloud:
        yield cloud


def real(fake: FakeCloud, on_rebalance: bool = False) -> Cloud:
    return clouds(MetadataClient(fake.url, timeout_s=1.0), on_rebalance)[fake.provider]


def test_each_service_is_recognised_as_its_own_alone(fake: FakeCloud) -> None:
    known = clouds(MetadataClient(fake.url, timeout_s=1.0))
    assert [name for name, cloud in known.items() if cloud.recognised()] == [fake.provider]


def test_nothing_then_a_notice(fake: FakeCloud) -> None:
    cloud = real(fake)
    assert cloud.poll(0.1) is None
    assert cloud.poll(0.1) is None
    fake.give_notice(25.0)
    notice = cloud.poll(0.1)
    assert notice is not None
    assert 20.0 < notice.deadline_s - time.time() <= 30.0
    assert cloud.poll(0.1) is not None, "it stays"


@pytest.mark.parametrize("fault", ["error", "garbage", "slow", "drip"])
def test_a_service_that_fails_tells_nothing_within_a_bound_and_is_asked_again(fake: FakeCloud, fault: str) -> None:
    cloud = real(fake)
    assert cloud.poll(0.1) is None
    fake.fault = fault
    began_s = time.monotonic()
    with pytest.raises(MetadataError):
        cloud.poll(0.1)
    assert time.monotonic() - began_s < 2.9, "the server would be slower"
    fake.fault = ""
    assert cloud.poll(0.1) is None


def test_a_service_that_is_gone_tells_nothing() -> None:
    with metadata_server("aws") as fake:
        known = clouds(MetadataClient(fake.url, timeout_s=1.0))
    for cloud in known.values():
        assert not cloud.recognised()
        with pytest.raises(MetadataError):
            cloud.poll(0.1)


def test_an_expired_token_is_replaced_at_once() -> None:
    with metadata_server("aws") as fake:
        cloud = real(fake)
        assert cloud.poll(0.1) is None
        fake.tokens.clear()
        fake.give_notice(60.0)
        assert cloud.poll(0.1) is not None
        assert [method for method, _, _ in fake.asked].count("PUT") == 2
        fake.tokens.clear()
        fake.fault = "refuse"
        with pytest.raises(MetadataError, match="403"):
            cloud.poll(0.1)


def test_a_recommendation_is_a_notice_only_on_request() -> None:
    with metadata_server("aws") as fake:
        fake.set("/latest/meta-data/events/recommendations/rebalance", '{"noticeTime": "2026-11-28T12:00:00Z"}')
        assert real(fake).poll(0.1) is None
        assert real(fake, on_rebalance=True).poll(0.1) is not None


def test_a_group_that_gives_the_instance_up_is_a_notice() -> None:
    with metadata_server("aws") as fake:
        fake.set("/latest/meta-data/autoscaling/target-lifecycle-state", "Terminated")
        assert real(fake).poll(0.1) is not None


def test_gcp_holds_its_answer_back_until_the_value_changes() -> None:
    with metadata_server("gcp") as fake:
        cloud = real(fake)
        assert cloud.poll(1.0) is None
        began_s = time.monotonic()
        assert cloud.poll(1.0) is None
        assert time.monotonic() - began_s >= 0.9
        fake.give_notice(30.0)
        began_s = time.monotonic()
        assert cloud.poll(10.0) is not None
        assert time.monotonic() - began_s < 5.0
        queries = [query for _, path, query in fake.asked if path.endswith("/preempted")]
        assert queries[0] == ""
        assert all("wait_for_change=true" in query and "last_etag=" in query for query in queries[1:])


def test_gcp_host_maintenance() -> None:
    with metadata_server("gcp") as fake:
        cloud = real(fake)
        fake.set("/computeMetadata/v1/instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        assert cloud.poll(0.1) is not None


def test_azure_events_of_other_machines_are_not_ours() -> None:
    with metadata_server("azure") as fake:
        cloud = real(fake)
        fake.give_notice(30.0, Resources=["worker_4"])
        assert cloud.poll(0.1) is None


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch, fake: FakeCloud) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert real(fake).poll(0.1) is None


@pytest.mark.parametrize("endpoint", ["", "169.254.169.254", "https://a", "http://", "http://a:b", "http://a/path"])
def test_a_wrong_endpoint_is_one_sentence(endpoint: str) -> None:
    with pytest.raises(UserError, match="http://HOST:PORT"):
        MetadataClient(endpoint)
