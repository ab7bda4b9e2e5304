"""Ray's temporary directories: what a killed driver left is removed by the next start, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from elastic_moe.actors.ray_directory import MARKER, PREFIX, TMPDIR, own_directory, sweep
from elastic_moe.coordination.owner import Owner

DRIVER = """
import sys, time
from elastic_moe.actors.ray_directory import own_directory
with own_directory() as root:
    print(root, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of the machine, for this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def driver() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A driver in another process, and its directory."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_a_directory_lives_as_long_as_its_driver() -> None:
    with own_directory() as root:
        assert (root / "ray").is_dir()
        assert os.environ[TMPDIR] == str(root)
        assert sweep() == []
    assert not root.exists()


def test_what_a_killed_driver_left_is_removed(driver: tuple[subprocess.Popen[str], Path], place: Path) -> None:
    process, left = driver
    assert left.parent == place
    assert sweep() == [], "it lives"
    process.kill()
    process.wait()
    with own_directory() as root:
        assert sorted(place.iterdir()) == [root]


def test_a_cluster_that_outlives_its_driver_keeps_its_directory(
    driver: tuple[subprocess.Popen[str], Path],
) -> None:
    process, left = driver
    process.kill()
    process.wait()
    raylet = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        env=os.environ | {TMPDIR: str(left)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert raylet.stdout is not None
        raylet.stdout.readline()
        assert sweep() == []
    finally:
        raylet.kill()
        raylet.communicate()
    assert sweep() == [left]


def test_what_is_not_known_to_be_ours_and_dead_is_left(place: Path) -> None:
    dead = replace(Owner.here(), started_s=1.0)  # another process with this id, long ago
    markers = {
        "nothing": None,
        "damaged": "{",
        "other": json.dumps({"pid": 1}),
        "elsewhere": json.dumps(asdict(replace(dead, machine="another boot"))),
    }
    for name, marker in markers.items():
        (place / f"{PREFIX}{name}").mkdir()
        if marker is not None:
            (place / f"{PREFIX}{name}" / MARKER).write_text(marker)
    for name in ("target", "foreign"):
        (place / name).mkdir()
        (place / name / MARKER).write_text(json.dumps(asdict(dead)))
    (place / f"{PREFIX}link").symlink_to(place / "target")
    assert sweep() == []
    (place / f"{PREFIX}old").mkdir()
    (place / f"{PREFIX}old" / MARKER).write_text(json.dumps(asdict(dead)))
    assert sweep() == [place / f"{PREFIX}old"]
