"""Notices of Ray about a death are one line; everything else that Ray prints stays as it is."""

from __future__ import annotations

import pytest
from ray._private.worker import print_to_stdstream

from elastic_moe.actors.ray_notices import short, shortened

WORKER = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, "
    "check the logs for the dead worker. Lease ID: 01000000bd6b Worker ID: 102acbd8adc9 Node ID: d3d5d6b459b7 Worker "
    "IP address: 192.0.2.2 Worker port: 33829 Worker PID: 399 Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called."
)
NODE = (
    "The node with node id: 0123456789abcdef and address: 192.0.2.7 and node name: 192.0.2.7 has been marked dead "
    "because the detector has missed too many heartbeats from it. This can happen when a \t(1) raylet crashes "
    "unexpectedly (OOM, etc.) \n\t(2) raylet has lagging heartbeats due to slow network or busy workload."
)


def test_short() -> None:
    assert short(WORKER) == (
        "Ray: process 399 on 192.0.2.2 died (SYSTEM_ERROR: Worker unexpectedly exits with a connection error code 2. "
        "End of file)"
    )
    assert short(NODE) == "Ray: node 01234567 at 192.0.2.7 does not answer any more, and counts as dead"
    raylet = "Raylet is terminated. Termination is unexpected. Possible reasons include: (1) SIGKILL by the user\n\n"
    assert (
        short(f"{raylet}    [state-dump]\n") == "Ray: the raylet of a node ended unexpectedly; its log is on that node"
    )
    assert short("A worker died of something else") == ""
    assert short(WORKER.replace("Worker PID: 399", "")) == "", "a notice that is not understood stays"


def test_only_notices_about_a_death_are_short(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    with shortened(told.append):
        lines = [WORKER, "The object store is full.", NODE]
        print_to_stdstream({"lines": lines, "pid": "raylet", "is_err": False}, ignore_prefix=False)
    print_to_stdstream({"lines": [NODE], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert [line.split()[1] for line in told] == ["process", "node"]
    out = capfd.readouterr().out
    assert "The object store is full." in out
    assert "A worker died" not in out
    assert out.count("marked dead") == 1, "afterwards Ray prints as it does"
