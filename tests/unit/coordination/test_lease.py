"""Of several processes one owns a directory; a dead owner is replaced at once, a silent one after the lease's time."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.coordination import lease as lease_module
from elastic_moe.coordination import owner as owner_module
from elastic_moe.coordination.lease import Lease, LeaseFile
from elastic_moe.coordination.owner import Owner
from elastic_moe.errors import UserError
from elastic_moe.run_dir import LEASE


def _contend(place: str, start: Any, results: Any, stop: Any) -> None:
    start.wait()
    try:
        with Lease(place, "run.dir"):
            results.put("owns")
            stop.wait()
    except UserError as error:
        results.put(str(error))


def _processes(place: Path, count: int) -> tuple[list[Any], Any, Any]:
    context = mp.get_context("fork")
    start, results, stop = context.Event(), context.Queue(), context.Event()
    processes = [context.Process(target=_contend, args=(str(place), start, results, stop)) for _ in range(count)]
    for process in processes:
        process.start()
    start.set()
    return processes, results, stop


def test_one_of_many_processes_owns_the_directory(tmp_path: Path) -> None:
    processes, results, stop = _processes(tmp_path, 6)
    said = [results.get(timeout=60) for _ in processes]
    assert said.count("owns") == 1
    assert sum("is in use by process" in text for text in said) == 5
    stop.set()
    for process in processes:
        process.join(60)
    assert not (tmp_path / LEASE).exists()


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path) -> None:
    (process,), results, _ = _processes(tmp_path, 1)
    assert results.get(timeout=60) == "owns"
    with pytest.raises(UserError, match=f"in use by process {process.pid}"), Lease(str(tmp_path), "run.dir"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with Lease(str(tmp_path), "run.dir"):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.05)
    monkeypatch.setattr(lease_module, "TTL_S", 0.5)


@pytest.mark.usefixtures("quick")
def test_a_silent_owner_of_another_machine_loses_it(tmp_path: Path) -> None:
    other = replace(Owner.here(), machine="elsewhere", host="far")
    (tmp_path / LEASE).write_text(json.dumps(asdict(other)))
    with Lease(str(tmp_path), "run.dir") as lease:
        assert lease.confirm()
        assert json.loads((tmp_path / LEASE).read_text())["host"] != "far"
        (tmp_path / LEASE).write_text(json.dumps(asdict(other)))  # taken over
        lease._thread.join(30)
        assert lease.lost
    assert json.loads((tmp_path / LEASE).read_text())["host"] == "far"


@pytest.mark.usefixtures("quick")
def test_a_successor_that_fails_leaves_the_directory_to_the_silent_owner(tmp_path: Path) -> None:
    silent = LeaseFile(tmp_path, replace(Owner.here(), machine="elsewhere"))
    silent.take()
    with pytest.raises(ZeroDivisionError), Lease(str(tmp_path), "run.dir"):
        raise ZeroDivisionError
    time.sleep(1.0)
    assert silent.beat(), "it was silent for longer than the lease lasts, and nobody replaced it"


@pytest.mark.usefixtures("quick")
def test_a_silent_owner_that_wakes_before_its_successor_is_ready_goes_on(tmp_path: Path) -> None:
    silent = LeaseFile(tmp_path, replace(Owner.here(), machine="elsewhere", host="far"))
    silent.take()
    with Lease(str(tmp_path), "run.dir") as heir, Lease(str(tmp_path), "run.dir") as other:
        assert silent.beat()
        for lease in (heir, other):
            with pytest.raises(UserError, match=r"is in use by process .* on far"):
                lease.confirm()
    assert silent.beat()


@pytest.mark.usefixtures("quick")
def test_of_two_successors_one_replaces_the_silent_owner(tmp_path: Path) -> None:
    silent = LeaseFile(tmp_path, replace(Owner.here(), machine="elsewhere"))
    silent.take()
    with Lease(str(tmp_path), "run.dir") as heir, Lease(str(tmp_path), "run.dir") as other:
        assert heir.confirm()
        assert not heir.confirm(), "there is nobody to replace any more"
        with pytest.raises(UserError, match="is in use by process"):
            other.confirm()
        assert not silent.beat()


@pytest.mark.usefixtures("quick")
def test_a_living_owner_of_another_machine_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(str(tmp_path), "run.dir"):
        monkeypatch.setattr(owner_module, "this_machine", lambda: "elsewhere")
        monkeypatch.setattr(lease_module, "TTL_S", 60.0)
        with pytest.raises(UserError, match="is in use"), Lease(str(tmp_path), "run.dir"):
            pass


def test_a_damaged_lease_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_bytes(b"\0")
    with Lease(str(tmp_path), "run.dir") as lease:
        assert not lease.lost
