"""The configuration of every start is kept: whatever stands in its directory, none is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.actors.identify import _write_config
from elastic_moe.run_dir import CONFIG, CONFIGS, START


def kept(run_dir: Path) -> dict[str, str]:
    """The configurations that are kept. Beside each stands what else is told of its start."""
    texts = {path.name: path.read_text() for path in sorted((run_dir / CONFIGS).iterdir()) if path.is_file()}
    return {name: text for name, text in texts.items() if not name.endswith(START)}


def test_every_start_has_a_number_and_the_newest_stands_beside(tmp_path: Path) -> None:
    for text in ("a: 1", "a: 2", "a: 3"):
        _write_config(tmp_path, text)
        assert (tmp_path / CONFIG).read_text() == text
    assert kept(tmp_path) == {"0001.yaml": "a: 1", "0002.yaml": "a: 2", "0003.yaml": "a: 3"}


def test_the_configuration_that_a_version_without_a_history_has_left_is_the_first(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(b"\xff old")
    _write_config(tmp_path, "a: 1")
    assert (tmp_path / CONFIGS / "0000.yaml").read_bytes() == b"\xff old"
    assert (tmp_path / CONFIGS / "0001.yaml").read_text() == "a: 1"


@pytest.mark.parametrize(
    ("there", "new"),
    [
        (("0001.yaml", "0007.yaml"), "0008.yaml"),
        (("0007.yaml",), "0008.yaml"),
        (("9999.yaml",), "10000.yaml"),
        (("0001.yaml", "9999.yaml", "99999.yaml", "100000.yaml"), "100001.yaml"),
        (("notes.txt", "best.yaml", "0003.yaml.bak", "12a.yaml", ".0009.yaml.tmp"), "0001.yaml"),
    ],
)
def test_gaps_long_numbers_and_other_files_are_left_as_they_are(
    tmp_path: Path, there: tuple[str, ...], new: str
) -> None:
    (tmp_path / CONFIGS).mkdir()
    for name in there:
        (tmp_path / CONFIGS / name).write_text(name)
    _write_config(tmp_path, "a: 1")
    assert kept(tmp_path) == {name: name for name in there} | {new: "a: 1"}


def test_a_directory_with_a_number_is_no_start_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / CONFIGS / "0001.yaml").mkdir(parents=True)
    _write_config(tmp_path, "a: 1")
    assert kept(tmp_path) == {"0002.yaml": "a: 1"}


def test_a_start_that_was_killed_while_it_wrote_takes_nothing_along(tmp_path: Path) -> None:
    _write_config(tmp_path, "a: 1")
    for path in (tmp_path / CONFIGS / ".0002.yaml.tmp", tmp_path / f".{CONFIG}.tmp"):
        path.write_text("half of a l")
    _write_config(tmp_path, "a: 2")
    assert kept(tmp_path) == {"0001.yaml": "a: 1", "0002.yaml": "a: 2"}
    assert (tmp_path / CONFIG).read_text() == "a: 2"
