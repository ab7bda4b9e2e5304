"""A worker that is aborted within a transfer, whose peers complete theirs with wrong bytes, as NCCL lets them.

The run must go on from what it held before: its losses are those of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.data.prepare import Prepared
from elastic_moe.errors import GroupAborted
from tests.dist.test_runtime import CORPUS, RTOL, with_steps
from tests.local_run import LocalRun, _work, tiny_config

pytestmark = pytest.mark.timeout(600)


def _poisoned(config: Any, address: Any, prepared: Prepared, worker: str, node: str) -> None:
    """A worker whose first transfer between peers that hold state fails: rank 0 is aborted, the others get noise."""
    from elastic_moe.runtime import reconfigure

    exchange, happened = reconfigure.exchange, Path(config.run.dir) / f"poisoned-{worker}"

    def poisoned(group: Any, outgoing: Any, incoming: Sequence[Sequence[torch.Tensor]], device: torch.device) -> None:
        if happened.exists():
            return exchange(group, outgoing, incoming, device=device)
        happened.touch()
        if group.rank == 0:
            raise GroupAborted("a peer was lost in the transfer")
        for tensor in (tensor for tensors in incoming for tensor in tensors):
            tensor.normal_()
        return None

    reconfigure.exchange = poisoned  # pyright: ignore[reportAttributeAccessIssue]
    _work(config, address, prepared, worker, node)


def test_wrong_bytes_of_an_aborted_transfer_are_never_state(tmp_path: Path) -> None:
    config = with_steps(tiny_config(tmp_path / "a" / "run", CORPUS), 16)
    with LocalRun(config, 1) as run:
        run.wait_end()
        expected = run.losses()
    config = with_steps(tiny_config(tmp_path / "b" / "run", CORPUS), 16)
    config.faults.inject = ["0:8:reduce"]  # its units move to new owners, from the mirrors
    with PoisonedRun(config, 4, nodes=4) as run:
        run.wait_end()
        assert len(list(run.dir.glob("poisoned-*"))) == 3
        assert run.losses() == pytest.approx(expected, rel=RTOL)
        entered = [event for event in run.events() if event["event"] == "entered"]
        assert [event["source"] for event in entered] == ["initialisation", "peers"]
        assert [event["lost_steps"] for event in entered] == [0, 0]


class PoisonedRun(LocalRun):
    work = staticmethod(_poisoned)
