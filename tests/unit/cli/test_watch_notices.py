"""`elastic-moe watch-notices` as a process: bad input is one sentence, and every end has its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from elastic_moe.cli.watch_notices import ENDPOINT
from tests.metadata_server import metadata_server

NOBODY = "--address=127.0.0.1:1"  # no Ray node of this machine is in that cluster
COMMAND = [sys.executable, "-m", "elastic_moe", "watch-notices", NOBODY]


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | env, check=False
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--every=0", "--every must be"),
        ("--every=nan", "--every must be"),
        ("--now=-1", "--now must be"),
        ("--detect=inf", "--detect must be"),
        ("--endpoint=ftp://a", "http://HOST:PORT"),
    ],
)
def test_bad_input_is_one_sentence(argument: str, words: str) -> None:
    done = call(argument)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_machine_of_no_cloud_is_told() -> None:
    with metadata_server("aws") as gone:
        pass
    done = call("--detect=0.1", f"--endpoint={gone.url}")
    assert done.returncode == 2
    assert "no metadata service of aws, gcp, azure answered" in done.stderr


def test_a_hook_on_a_machine_without_ray_is_done_at_once() -> None:
    done = call("--now=50")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to drain" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    with metadata_server("azure") as cloud:
        process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, env=os.environ | {ENDPOINT: cloud.url})
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            assert "this is a machine of azure" in lines[1]
            assert "watching azure every 2 s" in lines[2]
            process.send_signal(number)
            rest, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert rest.endswith("stopped\n")
        finally:
            process.kill()
            process.wait()


def test_it_needs_neither_ray_nor_torch() -> None:
    code = "import sys, elastic_moe.cli.watch_notices; print(sorted({'ray', 'torch', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
