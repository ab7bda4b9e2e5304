"""One run, or several, as one HTML page that needs no network: `report.html`.

The page has the charting library (Apache ECharts), the drawing code of `assets/` and the data. `RunReader` makes the
data small, so that a run of a million steps has a page of the same size as one of a thousand.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from elastic_moe import __version__
from elastic_moe.metrics.report.run_data import RunReader
from elastic_moe.run_dir import REPORT

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
SCRIPTS = (
    *("echarts.min.js", "core.js", "story.js", "curves.js", "experts.js", "panels.js", "compare.js"),
    "main.js",  # the last one: it draws the page
)
Json = dict[str, Any]


def write_report(run_dir: str | Path, target: str | Path = "") -> Path:
    """Write the page of a run.

    Args:
        run_dir: the run directory.
        target: the file; by default report.html in the run directory.

    Returns:
        The path of the file.

    Raises:
        UserError: the directory is not that of a run.
    """
    path = Path(target) if target else Path(run_dir) / REPORT
    path.write_text(page([RunReader(run_dir).read()]), encoding="utf-8")
    return path


def compare_runs(run_dirs: Sequence[str | Path], target: str | Path) -> Path:
    """Write one page of several runs, and return its path.

    Raises:
        UserError: one of the directories is not that of a run.
    """
    path = Path(target)
    path.write_text(page(read_runs([RunReader(run_dir) for run_dir in run_dirs])), encoding="utf-8")
    return path


def read_runs(readers: Sequence[RunReader]) -> list[Json]:
    """The runs, with names that tell them apart.

    Raises:
        UserError: one of the directories is not that of a run.
    """
    runs = [reader.read() for reader in readers]
    given = [run["name"] for run in runs]
    names: list[str] = []
    for number, (run, reader) in enumerate(zip(runs, readers, strict=True), 1):
        if given.count(run["name"]) > 1:
            run["name"] = f"{reader.run_dir.absolute().parent.name}/{run['name']}"
        if run["name"] in names:
            run["name"] += f" ({number})"
        names.append(run["name"])
    return runs


def page_data(runs: Sequence[Json], live: Mapping[str, Any] | None = None) -> Json:
    """What the page draws: `live` says where, and how often, it asks for news; None for a page that rests."""
    return {"version": __version__, "runs": list(runs), "live": live}


def page(runs: Sequence[Json], live: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    title = html.escape(", ".join(run["name"] for run in runs[:3]) + (", ..." if len(runs) > 3 else ""))
    data = json.dumps(page_data(runs, live), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    scripts = "".join(f"<script>{_asset(name)}</script>\n" for name in SCRIPTS)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>\n{_asset("page.css")}</style>\n</head>\n'
        "<body>\n<main><noscript>This page is drawn by a script that it contains.</noscript></main>\n"
        f'<script type="application/json" id="data">{data}</script>\n{scripts}</body>\n</html>\n'
    )


def _asset(name: str) -> str:
    return (files("elastic_moe.metrics.report") / "assets" / name).read_text(encoding="utf-8")
