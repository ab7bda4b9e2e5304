"""Free memory goes back to the system between views, and stays within a step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastic_moe.runtime.allocator import _of_libc, give_back, keep

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


@pytest.mark.skipif(_of_libc("malloc_trim") is None, reason="the C library is not glibc")
def test_gaps_in_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    alone, with_help = map(int, done.stdout.split())
    assert alone < 8 << 20, "then it would not be needed"
    assert with_help > 64 << 20


STEPS = """
import resource
import torch
from elastic_moe.runtime.allocator import give_back, keep

def step():
    for _ in range(2):  # what is freed is used again, and then the top of the heap is free
        blocks = [torch.ones(1 << 20) for _ in range(10)]  # 4 MiB each
        del blocks

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep()
faults(4)  # until the heap has room for a step, wherever its blocks come to lie
kept = faults(5)
give_back()
print(kept, faults(1))
"""


@pytest.mark.skipif(_of_libc("malloc_trim") is None, reason="the C library is not glibc")
def test_a_step_uses_the_pages_of_the_one_before() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 500, "pages were made anew"
    assert given_back > 5000, "nothing was given back"


def test_it_may_be_called_at_any_time() -> None:
    give_back()
    keep()
