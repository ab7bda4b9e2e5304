"""A run as one HTML page: `report.html` in its directory. One file without scripts or links.

It shows a picture over wall-clock time, and curves over the steps with the changes of membership. Each MoE layer has
three pictures over time, with one row per expert: its load, the rank of its home, and the number of its copies. These
are PNG, with a pixel per expert and record.
"""

from __future__ import annotations

import html
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.metrics.expert_history import COPY_CAME, HOME_CAME, LoadRecord, PlacementRecord, read_history
from elastic_moe.metrics.format_event import format_loss
from elastic_moe.metrics.records import read_events, read_metrics
from elastic_moe.metrics.report.drawing import HOT, Colour, curve, heat, hue, png, thinned
from elastic_moe.metrics.report.timeline import timeline_of
from elastic_moe.metrics.report.timeline_svg import timeline_svg
from elastic_moe.metrics.schema import units
from elastic_moe.run_dir import EXPERTS, REPORT

CURVES = (  # key of metrics.jsonl, title
    ("loss", "loss"),
    ("tokens_per_s", "speed"),
    ("world_size", "workers"),
    ("balance", "balance of the experts: mean over slowest rank"),
    ("mtp_loss", "loss of multi-token prediction"),
)
MEMBERSHIP = ("view", "entered", "pause", "worker_lost", "worker_evicted", "rolled_back")
MAX_ROWS = 200  # of a table
MAX_TIMES = 200  # columns of the pictures of homes and copies

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
h2 { margin-top: 2em } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
img { image-rendering: pixelated; width: 100%; border: 1px solid #ccc } .timeline { border: 0 }
svg { width: 100% } .note { color: #666 }
details { margin: .6em 0 } .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write the page into the run directory. Returns its path.

    Raises:
        UserError: the directory is not that of a run.
    """
    path = Path(run_dir)
    title, page = html.escape(path.absolute().name), "\n".join(_body(path))
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    target = path / REPORT
    target.write_text(f"{head}\n<h1>{title}</h1>\n{page}\n", encoding="utf-8")
    return target


def _body(run_dir: Path) -> Iterator[str]:
    records, events = read_metrics(run_dir), read_events(run_dir)
    entered = [event for event in events if event["event"] == "entered"]
    last = records[-1]
    yield (
        f"<p>{last['step']} steps committed, loss {format_loss(last['loss'])}, "
        f"{last['world_size']} workers at the end, "
        f"{max(len(entered) - 1, 0)} changes of membership (red lines), "
        f"{sum(event.get('lost_steps', 0) for event in entered)} steps lost.</p>"
    )
    picture = timeline_svg(timeline_of(records, events), title="Over wall-clock time")
    yield f'<img class="timeline" src="data:image/svg+xml;base64,{b64encode(picture.encode()).decode()}" alt="">'
    marks = [float(event["step"]) for event in entered[1:]]
    unit_of = units()
    for key, title in CURVES:
        points = [(record["step"], record[key]) for record in thinned(records) if record.get(key) is not None]
        yield curve(f"{title} ({unit_of[key]})" if key in unit_of else title, points, marks)
    if (run_dir / EXPERTS).exists():
        history, loads = read_history(run_dir)
        if history:
            yield "<h2>Experts</h2><p>One row per expert, time from left to right. "
            yield "<code>elastic-moe explain RUN --layer L --expert E</code> says why an expert moved.</p>"
            for layer in history[-1].layers():
                yield _layer_pictures(layer, history, loads, int(last["step"]))
    changes = [event for event in events if event["event"] == "rebalanced"]
    yield from _table("Changes of placement for the load", changes, _change)
    yield from _table("Membership", [event for event in events if event["event"] in MEMBERSHIP], _membership)


def _layer_pictures(layer: int, history: Sequence[PlacementRecord], loads: Sequence[LoadRecord], steps: int) -> str:
    """Load, homes and copies of one layer's experts over time, as HTML."""
    experts = history[-1].experts(layer)
    pictures: list[str] = []

    def picture(title: str, rows: list[list[Colour]]) -> None:
        height = max(120, 3 * len(rows))
        pictures.append(f'<div>{title}<img src="{png(rows)}" style="height:{height}px" alt=""></div>')

    if loads:
        chosen = thinned(loads)
        means = [max(sum(record.tokens[layer]), 1) / len(experts) for record in chosen]
        rows = [[heat(r.tokens[layer][e] / mean) for r, mean in zip(chosen, means, strict=True)] for e in experts]
        picture(f"load (dark: {HOT:g} times the mean)", rows)
    times = min(max(steps, 1), MAX_TIMES)
    starts = [record.step for record in history]
    shown = [history[max(bisect_right(starts, round(i * steps / times)) - 1, 0)] for i in range(times + 1)]
    ranks = max(len(record.ranks) for record in history)
    picture("home (a colour per rank)", [[hue(r.home[layer, e], ranks) for r in shown] for e in experts])
    scale = HOT / max(ranks - 1, 1)
    copies = [[heat(scale * len(r.replicas(layer, e))) for r in shown] for e in experts]
    picture("copies (white: one; dark: as many as ranks)", copies)
    kinds = (COPY_CAME, HOME_CAME)
    moved = sum(move.layer == layer and move.kind in kinds for record in history for move in record.moves)
    title = f"MoE layer {layer}: {len(experts)} experts, {moved} copies and homes moved"
    start = "<details open>" if layer == 0 else "<details>"
    return f'{start}<summary>{title}</summary><div class="three">{"".join(pictures)}</div></details>'


def _change(event: dict[str, Any]) -> list[str]:
    expected, measured = event["expected"], event["measured"]
    return [
        f"step {event['step']}",
        f"expected {1e3 * expected['gain_s']:.2f} ms a step for {1e3 * expected['cost_s']:.2f} ms",
        f"then {1e3 * measured['gain_s']:.2f} ms a step over {measured['steps']} steps, "
        f"changing took {1e3 * measured['switch_s']:.2f} ms",
        f"{expected['moved_bytes'] / 2**20:.2f} MiB moved",
    ]


def _membership(event: dict[str, Any]) -> list[str]:
    took = f"{event['total_s']:.2f} s" if "total_s" in event else ""
    cells = [f"step {event.get('step', '')}", event["event"], event.get("reason", ""), event.get("worker", ""), took]
    return [str(cell) for cell in cells]


def _table(title: str, events: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]) -> Iterator[str]:
    """Events as rows; of very many, the first ones."""
    if events:
        yield f"<h2>{title}</h2><table>"
        for event in events[:MAX_ROWS]:
            yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(event)) + "</tr>"
        yield "</table>"
        if len(events) > MAX_ROWS:
            yield f'<p class="note">and {len(events) - MAX_ROWS} more</p>'
