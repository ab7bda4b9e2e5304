"""Processes that claim a checkpoint root on an S3 server: one owns it, a dead owner is replaced, and so on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from elastic_moe.checkpoint.storage import Storage
from elastic_moe.cli.checkpoint import main
from elastic_moe.coordination.claims import Claims
from elastic_moe.coordination.lease import Lease
from elastic_moe.coordination.owner import Owner, Taken
from elastic_moe.errors import UserError
from elastic_moe.run_dir import CLAIMS
from tests.processes import CONTEXT, start
from tests.s3_server import WRITES, Fault, Proxy

pytestmark = pytest.mark.timeout(300)


def contend(place: str, begin: Any, results: Any, stop: Any) -> None:
    results.put("ready")
    begin.wait()
    try:
        with Lease(place, "checkpoint.dir"):
            results.put("owns")
            stop.wait()
    except UserError as error:
        results.put(str(error))


def processes(place: str, count: int) -> tuple[list[Any], Any, Any]:
    begin, results, stop = CONTEXT.Event(), CONTEXT.Queue(), CONTEXT.Event()
    started = [start(contend, place, begin, results, stop) for _ in range(count)]
    assert [results.get(timeout=120) for _ in started] == ["ready"] * count
    begin.set()
    return started, results, stop


def assert_one_of_several_owns(root: str) -> None:
    started, results, stop = processes(root, 3)
    said = [results.get(timeout=120) for _ in started]
    assert said.count("owns") == 1, said
    assert sum("is in use by process" in text for text in said) == 2, said
    stop.set()
    for process in started:
        process.join(60)
    assert not Storage(root).sizes(CLAIMS)


def test_one_of_several_processes_owns_the_root(root: str) -> None:
    assert_one_of_several_owns(root)


def test_a_killed_owner_is_replaced_at_once_and_prune_is_refused_before(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (process,), results, _ = processes(root, 1)
    assert results.get(timeout=120) == "owns"
    assert main(["prune", root]) == 2
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert main(["prune", root]) == 0
    assert not Storage(root).sizes(CLAIMS)


def test_a_silent_owner_is_replaced_and_told(root: str) -> None:
    silent = Claims(root, replace(Owner.here(), machine="elsewhere"), 0.1, 2.0)
    silent.take()
    heir = Claims(root, Owner.here(), 0.1, 2.0)
    heir.take()
    assert silent.beat(), "nobody has replaced it yet"
    with pytest.raises(Taken):
        heir.confirm()
    heir.release()
    heir = Claims(root, Owner.here(), 0.1, 2.0)
    heir.take()
    assert heir.confirm()
    assert not silent.beat()
    assert heir.beat()
    heir.release()


@pytest.mark.parametrize("kind", ["403", "500"])
def test_a_storage_that_fails_costs_no_lease(root: str, proxy: Proxy, kind: str) -> None:
    proxy.fault = Fault(kind, WRITES)
    with pytest.raises(UserError, match="cannot be written"), Lease(root, "checkpoint.dir"):
        pass
    proxy.fault = Fault()
    owner = Claims(root, Owner.here(), 0.1, 0.5)
    owner.take()
    proxy.fault = Fault(kind)
    with pytest.raises(OSError, match="AWS Error"):
        owner.beat()
    proxy.fault = Fault()
    assert owner.beat()
    owner.release()
