"""Free memory between blocks in use goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastic_moe.runtime.allocator import _trim, give_back

CODE = """
from pathlib import Path
import torch
from elastic_moe.runtime.allocator import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

seen = torch.ones(4 << 20)  # a block of 16 MiB that is freed: such blocks are in the heap from now on
del seen
blocks = [torch.ones(1 << 20) for _ in range(40)]  # 4 MiB each
kept = blocks[1::2]
full = resident()
del blocks
before = resident()
give_back()
print(full - before, before - resident())
"""


@pytest.mark.skipif(_trim() is None, reason="the C library is not glibc")
def test_gaps_in_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    alone, with_help = map(int, done.stdout.split())
    assert alone < 8 << 20, "then it would not be needed"
    assert with_help > 64 << 20


def test_it_may_be_called_at_any_time() -> None:
    give_back()
