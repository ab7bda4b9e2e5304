"""Triton's kernels on a machine without a GPU: run by its interpreter, and compiled to machine code of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """Run a file's tests with the interpreter, in a process of its own: Triton looks for its switch when imported."""
    command = [sys.executable, "-m", "pytest", "-rs", "-o", "addopts=--import-mode=importlib", file]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout, done.stdout[-500:]


def assert_compiles(
    kernel: Any, constants: Mapping[str, Any], kinds: Mapping[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of a Hopper GPU, which needs none. The interpreter takes what the compiler refuses.

    Args:
        kernel: the function.
        constants: its compile-time arguments.
        kinds: types of arguments that are neither fp32 pointers, named `*_ptr`, nor int32.
        cache: directory for Triton's files.
        monkeypatch: of the test.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    names = [parameter.name for parameter in kernel.params]
    pointers = {name: "*fp32" for name in names if name.endswith("_ptr")}
    types = pointers | dict(kinds) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
