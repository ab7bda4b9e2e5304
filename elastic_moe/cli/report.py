"""A run as one page to look at: `python -m elastic_moe.report RUN` writes RUN/report.html; training does so at its end.

Curves over the steps, changes of membership, and for every MoE layer three pictures over time, one row per expert: its load, the rank of its
home, and how many copies it has. One file without scripts or links; pictures are PNG, a pixel per expert and record.
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import html
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.cli.explain import CAME, HOME, Loads, Placed, read
from elastic_moe.errors import UserError
from elastic_moe.metrics.recorder import read_jsonl
from elastic_moe.run_dir import EVENTS, EXPERTS, METRICS, REPORT

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 860, 190, 70, 14, 24
HOT = 3.0  # times the mean load: the end of the colour scale
MAX_COLUMNS = 800
Colour = tuple[int, int, int]

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { margin-top: 2em } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
img { image-rendering: pixelated; width: 100%; border: 1px solid #ccc } svg { width: 100% } .note { color: #666 }
details { margin: .6em 0 } .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em }
"""


def png(pixels: Sequence[Sequence[Colour]]) -> str:
    """Rows of pixels as a data URI."""
    raw = b"".join(b"\0" + bytes(part for colour in row for part in colour) for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def heat(value: float) -> Colour:
    """From white over orange to dark red, at HOT."""
    t = min(max(value / HOT, 0.0), 1.0)
    return (round(255 - 120 * max(0.0, t - 0.5) * 2), round(250 - 230 * t), round(240 - 240 * min(1.0, 1.6 * t)))


def hue(rank: int, ranks: int) -> Colour:
    """A colour per rank; neighbours differ in brightness too."""
    red, green, blue = colorsys.hls_to_rgb(rank / max(ranks, 1), 0.42 + 0.2 * (rank % 2), 0.55)
    return (round(255 * red), round(255 * green), round(255 * blue))


def curve(name: str, points: Sequence[tuple[float, float]], marks: Sequence[float] = ()) -> str:
    """One line over the steps; `marks` are steps at which the membership changed."""
    if not points:
        return ""
    (first, last), values = (points[0][0], max(points[-1][0], points[0][0] + 1)), [y for _, y in points]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">']
    for i in range(4):
        value = low + (high - low) * i / 3
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for mark in marks:
        parts.append(
            f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#c8553d" opacity=".5"/>'
        )
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4c6a92" stroke-width="1.6"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">step {first:g}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">{last:g}</text></svg>')
    return f"<h3>{html.escape(name)}</h3>" + "".join(parts)


def thinned(items: Sequence[Any], most: int = MAX_COLUMNS) -> list[Any]:
    """Evenly chosen, at most `most`, with the last one."""
    step = -(-len(items) // most) or 1
    return [*items[:-1][::step], *items[-1:]]


def layer_pictures(layer: int, history: Sequence[Placed], loads: Sequence[Loads], steps: int) -> str:
    """Load, homes and copies of one layer's experts over time."""
    experts = sorted(e for at, e in history[-1].home if at == layer)
    parts: list[str] = []

    def picture(title: str, rows: list[list[Colour]]) -> None:
        parts.append(f'<div>{title}<img src="{png(rows)}" style="height:{max(120, 3 * len(rows))}px" alt=""></div>')

    if loads:
        chosen = thinned(loads)
        means = [max(sum(one.tokens[layer]), 1) / len(experts) for one in chosen]
        rows = [[heat(one.tokens[layer][e] / mean) for one, mean in zip(chosen, means, strict=True)] for e in experts]
        picture(f"load (dark: {HOT:g} times the mean)", rows)
    times = [round(i * steps / min(max(steps, 1), 200)) for i in range(min(max(steps, 1), 200) + 1)]
    at, known = 0, []
    for step in times:
        while at + 1 < len(history) and history[at + 1].step <= step:
            at += 1
        known.append(history[at])
    ranks = max(len(placed.ranks) for placed in history)
    picture("home (a colour per rank)", [[hue(p.home[layer, e], ranks) for p in known] for e in experts])
    picture(
        "copies (white: one; dark: as many as ranks)",
        [[heat(HOT * (len(p.copies[layer, e]) - 1) / max(ranks - 1, 1)) for p in known] for e in experts],
    )
    moved = sum(move[0] == layer and move[3] in (CAME, HOME) for placed in history for move in placed.moves)
    title = f"MoE layer {layer}: {len(experts)} experts, {moved} copies and homes moved"
    return f'<details{" open" if layer == 0 else ""}><summary>{title}</summary><div class="three">{"".join(parts)}</div></details>'


def body(run_dir: Path) -> Iterator[str]:
    """The page's parts."""
    records = read_jsonl(run_dir / METRICS)
    if not records:
        raise UserError(
            f"{run_dir}: no committed step is recorded in metrics.jsonl; is it the directory of a run (run.dir)?"
        )
    events = read_jsonl(run_dir / EVENTS)
    entered = [e for e in events if e.get("event") == "entered"]
    marks = [float(e.get("step", 0)) for e in entered[1:]]
    last = records[-1]
    yield f"<h1>{html.escape(run_dir.name)}</h1>"
    yield (
        f"<p>{last['step']} steps committed, loss {last['loss']:.4f}, {last['world_size']} workers at the end, "
        f"{max(len(entered) - 1, 0)} changes of membership (red lines), {sum(e.get('lost_steps', 0) for e in entered)} steps lost.</p>"
    )
    for name, key in (("loss", "loss"), ("tokens per second", "tokens_per_s"), ("workers", "world_size")):
        yield curve(name, [(r["step"], r[key]) for r in thinned(records) if r.get(key) is not None], marks)
    yield curve(
        "balance of the experts (mean over slowest rank)", [(r["step"], r["balance"]) for r in thinned(records)], marks
    )
    if (run_dir / EXPERTS).exists():
        history, loads = read(run_dir)
        if history:
            yield "<h2>Experts</h2><p>One row per expert, time from left to right. "
            yield "<code>python -m elastic_moe.plan.explain RUN --layer L --expert E</code> says why one moved.</p>"
            for layer in sorted({layer for layer, _ in history[-1].home}):
                yield layer_pictures(layer, history, loads, int(last["step"]))
    yield from table(
        "Changes of placement for the load", [e for e in events if e.get("event") == "rebalanced"], _change
    )
    yield from table(
        "Membership",
        [e for e in events if e.get("event") in ("view", "entered", "worker_lost", "worker_evicted")],
        _event,
    )


def _change(event: dict[str, Any]) -> list[str]:
    expected, measured = event["expected"], event["measured"]
    return [
        f"step {event['step']}",
        f"expected {1e3 * expected['gain_s']:.2f} ms a step for {1e3 * expected['cost_s']:.2f} ms",
        f"then {1e3 * measured['gain_s']:.2f} ms a step over {measured['steps']} steps, changing took {1e3 * measured['switch_s']:.2f} ms",
        f"{expected['moved_bytes'] / 2**20:.2f} MiB moved",
    ]


def _event(event: dict[str, Any]) -> list[str]:
    took = f"{event['total_s']:.2f} s" if "total_s" in event else ""
    return [
        f"step {event.get('step', '')}",
        str(event["event"]),
        str(event.get("reason", "")),
        str(event.get("worker", "")),
        took,
    ]


def table(title: str, events: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]) -> Iterator[str]:
    """Events as rows; of very many, the first ones."""
    if events:
        yield f"<h2>{title}</h2><table>"
        for event in events[:200]:
            yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(event)) + "</tr>"
        yield "</table>" + (f'<p class="note">and {len(events) - 200} more</p>' if len(events) > 200 else "")


def write_report(run_dir: str | Path) -> Path:
    """Write the page into the run directory. Returns its path.

    Raises:
        UserError: the directory is not that of a run.
    """
    path = Path(run_dir)
    page = "\n".join(body(path))
    target = path / REPORT
    target.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(path.name)}</title><style>{STYLE}</style>\n{page}\n'
    )
    return target


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m elastic_moe.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the run directory")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
