"""Makes the repository importable in the processes that these tests spawn, and offers an S3 server."""

from __future__ import annotations

import gc
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from elastic_moe.checkpoint.storage import set_timeout  # noqa: E402
from elastic_moe.environment import environment  # noqa: E402
from tests.s3_server import BUCKET, Fault, Proxy, faulty_proxy, s3_server, variables  # noqa: E402


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def proxy(s3_port: int) -> Iterator[Proxy]:
    with faulty_proxy(s3_port) as proxy, environment(variables(proxy)):
        set_timeout(6.0)
        yield proxy
        proxy.fault = Fault()
        set_timeout(60.0)
        gc.collect()  # closes the connections of S3 clients


@pytest.fixture
def root(proxy: Proxy) -> str:
    """A checkpoint root of the test's own."""
    assert proxy.fault == Fault()
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/checkpoints"
