"""What the servers of `tests.processes` import and load before they fork: all that a worker needs before it trains."""

from __future__ import annotations

import gc
import os

import torch

import tests.dist.ranks
import tests.local_run  # noqa: F401
from elastic_moe.runtime.warm_planner import warm_up

torch.set_num_threads(1)
warm_up()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
gc.collect()
gc.freeze()  # the collector of a forked process would write to all these objects, and so copy their memory
