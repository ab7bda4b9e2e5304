"""The Grafana dashboard that is shipped agrees with the metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

from elastic_moe.metrics.exported import EXPORTED, GROUPS, HISTOGRAM, RUN_NAME, Exported
from scripts.grafana import BY_NAME, CONTROLLER, PATH, ROWS, dashboard, text

SHIPPED: dict[str, Any] = json.loads(PATH.read_text())
TARGETS = [target for panel in SHIPPED["panels"] for target in panel.get("targets", ())]


def exposed(metric: Exported) -> set[str]:
    if metric.kind == HISTOGRAM:
        return {f"{metric.series}_bucket"}
    return {metric.series}


def test_the_file_is_what_its_program_makes() -> None:
    assert PATH.read_text() == text(), "run python -m scripts.grafana --write"


def test_every_metric_is_shown_in_its_row_and_nothing_else() -> None:
    known = set[str]().union(*map(exposed, EXPORTED))
    asked = {name for target in TARGETS for name in re.findall(r"\bray_\w+(?=\{)", target["expr"])}
    assert asked == known | {CONTROLLER}
    for title, row in ROWS.items():
        assert {BY_NAME[name] for panel in row for name in panel.metrics} == set(GROUPS[title])


def test_every_query_is_of_the_chosen_runs_and_has_their_tags() -> None:
    for target in TARGETS:
        assert f'{RUN_NAME}=~"$run"' in target["expr"]
        assert RUN_NAME in re.findall(r"by \(([^)]*)\)", target["expr"])[0]
        for tag in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert tag in target["expr"], "Grafana's legend names a tag that the query has"


def test_pictures_do_not_lie_upon_one_another_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in SHIPPED["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        taken |= cells
        assert panel["type"] == "row" or (panel["description"] and panel["fieldConfig"]["defaults"]["unit"])
    assert max(x for x, _ in taken) < 24


def test_variables() -> None:
    assert [variable["name"] for variable in dashboard()["templating"]["list"]] == ["datasource", "run"]
    assert len({panel["id"] for panel in SHIPPED["panels"]}) == len(SHIPPED["panels"])
