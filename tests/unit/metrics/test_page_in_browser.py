"""The page in a real browser: it draws without an error, fits on a phone, follows a run, and obeys the keyboard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.report.page import compare_runs, write_report
from elastic_moe.metrics.report.run_data import RunReader
from elastic_moe.metrics.report.serve import ReportServer
from tests.browser import browser, opened
from tests.unit.metrics.synthetic import step, write_run

pytestmark = pytest.mark.slow
COLOURS = """canvas => {
    const found = new Set(), data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 0; i < data.length; i += 4) found.add(data[i] + 256 * data[i + 1] + 65536 * data[i + 2]);
    return found.size;
}"""


@pytest.fixture
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("page") / "a run")
    (run_dir / "config.yaml").write_text("run:\n  steps: 9\noptim:\n  lr: 0.003\n")
    times = [{"training": 8.0 * n, "redone": 0.0, "recovering": 1.0 * n, "start": 3.0} for n in (1, 2, 3, 4)]
    books = [
        {"time": 1000.0 + 2 * n, "step": n, "worker_s": each, "total_s": sum(each.values()), "goodput": 0.8,
         "ettr": 0.9, "failures": 2, "mttr_s": 1.5, "mtbf_s": 4.0, "node_s": {}, "cost": 0.5 * n}
        for n, each in enumerate(times, 1)
    ]  # fmt: skip
    (run_dir / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in books))
    write_report(run_dir)
    return run_dir


def url_of(path: Path) -> str:
    return path.absolute().as_uri()


def test_every_panel_is_drawn_and_fits(chromium: Any, run: Path) -> None:
    for width, scheme in product((1280, 390), ("light", "dark")):
        assert_drawn(chromium, run, width, scheme)


def assert_drawn(chromium: Any, run: Path, width: int, scheme: str) -> None:
    """The page at this width and in this scheme has all panels, and no chart of them is empty."""
    with opened(chromium, url_of(run / "report.html"), width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        panels = ["timeline", "time", "curves", "experts", "checkpoints", "events", "setup"]
        assert page.locator("section").evaluate_all("all => all.map(one => one.id)") == panels
        for panel in ("timeline", "time", "curves", "experts"):
            canvases = page.locator(f"#{panel} canvas")
            assert canvases.count() >= {"curves": 5, "experts": 3}.get(panel, 1)
            for index in range(canvases.count()):
                assert canvases.nth(index).evaluate(COLOURS) > 3, f"{panel}: chart {index} is empty"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
        assert dark is (scheme == "dark")


def test_the_pointer_tells_a_worker_and_its_end(chromium: Any, run: Path) -> None:
    with opened(chromium, url_of(run / "report.html")) as page:
        place = page.evaluate(
            """() => {
            const run = page.runs[0], made = [...charts.values()][0];
            const bars = run.lanes.bars, index = bars.findIndex((bar) => bar.end === "died");
            const row = run.lanes.nodes.findIndex((node) => node.id === bars[index].node) + bars[index].row;
            const [x, y] = made.convertToPixel({ xAxisIndex: 2, yAxisIndex: 2 }, [1.0, row]);
            const box = made.getDom().getBoundingClientRect();
            return [box.x + x, box.y + y + scrollY];
        }"""
        )
        page.mouse.move(place[0], place[1])
        page.mouse.move(place[0] + 1, place[1])
        tip = page.locator("#timeline .chart > div").last
        tip.get_by_text("died at").wait_for()
        assert "connection closed" in tip.inner_text()


def test_axis_smoothing_and_theme_can_be_chosen_by_keyboard(chromium: Any, run: Path) -> None:
    with opened(chromium, url_of(run / "report.html")) as page:
        chosen = page.locator("#curves .choice button", has_text="cost")
        page.locator("#theme").focus()
        for _ in range(60):
            page.keyboard.press("Tab")
            if chosen.evaluate("one => one === document.activeElement"):
                break
        page.keyboard.press("Enter")
        assert chosen.get_attribute("aria-pressed") == "true"
        assert chosen.evaluate("one => one === document.activeElement"), "the focus stays where it was"
        names = page.evaluate("[...charts.values()].map((made) => made.getOption().xAxis[0].name)")
        assert names.count("price") >= 5
        page.locator("#theme").press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_several_runs_stand_beside_each_other(chromium: Any, run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    (other / "config.yaml").write_text("run:\n  steps: 9\noptim:\n  lr: 0.004\n")
    target = compare_runs([run, other], tmp_path / "both.html")
    with opened(chromium, url_of(target), 390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("#differences tbody tr").all_inner_texts() == ["optim.lr\t0.003\t0.004"]
        lines = "[...charts.values()][0].getOption().series.filter((one) => one.type === 'line').map((one) => one.name)"
        assert page.evaluate(lines) == ["a run", "other"]
        page.get_by_role("group", name="runs").get_by_text("a run").click()
        assert page.evaluate(lines) == ["other"]


def test_an_open_page_follows_the_run(chromium: Any, tmp_path: Path) -> None:
    live = write_run(tmp_path / "live")
    with ReportServer([RunReader(live)], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            with opened(chromium, server.url) as page:
                assert page.locator(".tile b").first.inner_text() == "7"
                with (live / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(step(8, 9.0, 4, 3)) + "\n")
                page.locator(".tile b").first.get_by_text("8").wait_for()
        finally:
            server.shutdown()
            thread.join()
