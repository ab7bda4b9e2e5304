"""The picture of a run under kills: loss, speed and number of workers over wall-clock time, changes marked.

The SVG needs no other file. It has a background of its own. In dark mode background and text change their colours
together, so the picture is legible on any page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.metrics.report.timeline import JOINED, LEFT, LOST, RESUMED, Mark, Points, Timeline, read_timeline

WIDTH, MARGIN_LEFT, MARGIN_RIGHT = 880, 66, 24
PLOT_LEFT, PLOT_RIGHT = MARGIN_LEFT, WIDTH - MARGIN_RIGHT
LABELS_TOP = 78  # of the two rows of labels above the plots
LABEL_WIDTH = 62  # labels of one row that are closer than this would overlap
TICKS_PER_PLOT, TICKS_OF_TIME = 5, 8
SYMBOLS = {LOST: "▼", LEFT: "▽", JOINED: "▲", RESUMED: "▶"}
WORDS = {
    LOST: "lost (seconds to the next committed step)",
    LEFT: "left as planned",
    JOINED: "joined",
    RESUMED: "resumed",
}

STYLE = """
.card{fill:#fff;stroke:#d0d7de}.grid{stroke:#e4e8ec}.axis{stroke:#afb8c1}
text{fill:#1f2328;font:12px -apple-system,"Segoe UI","DejaVu Sans",Helvetica,Arial,sans-serif}
.title{font-size:16px;font-weight:600}.dim{fill:#59636e}.end{text-anchor:end}.middle{text-anchor:middle}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}.loss{stroke:#0969da}.speed{stroke:#8250df}
.area{fill:#8250df;fill-opacity:.12;stroke:none}.workers{stroke:#57606a}
.steps{fill:#57606a;fill-opacity:.15;stroke:none}
line.lost{stroke:#cf222e}text.lost{fill:#cf222e}line.joined{stroke:#1a7f37}text.joined{fill:#1a7f37}
line.left,line.resumed{stroke:#9a6700}text.left,text.resumed{fill:#9a6700}.mark{stroke-width:1.2;stroke-dasharray:4 3}
@media (prefers-color-scheme:dark){.card{fill:#0d1117;stroke:#3d444d}.grid{stroke:#21262d}.axis{stroke:#59636e}
text{fill:#f0f6fc}.dim{fill:#9198a1}.loss{stroke:#4493f8}.speed{stroke:#ab7df8}.area{fill:#ab7df8}
.workers{stroke:#9198a1}.steps{fill:#9198a1}line.lost{stroke:#f85149}text.lost{fill:#f85149}
line.joined{stroke:#3fb950}text.joined{fill:#3fb950}line.left,line.resumed{stroke:#d29922}
text.left,text.resumed{fill:#d29922}}
"""


@dataclass(frozen=True)
class _Plot:
    """One of the plots that stand below each other.

    Attributes:
        top, bottom: its edges in the picture.
        low, high: values at the bottom and at the top.
    """

    title: str
    top: int
    bottom: int
    low: float
    high: float

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low)


def write_timeline(run_dir: str | Path, target: str | Path, title: str = "") -> Path:
    """Write the picture of a run. Returns its path.

    Args:
        run_dir: the run directory.
        target: the file to write.
        title: heading; made from the run's figures if empty.

    Raises:
        UserError: the directory is not that of a run.
    """
    path = Path(target)
    path.write_text(timeline_svg(read_timeline(run_dir), title), encoding="utf-8")
    return path


def timeline_svg(timeline: Timeline, title: str = "") -> str:
    """The picture as the text of an SVG file."""
    losses = [value for _, value in timeline.loss] or [0.0]
    top_speed = _above([value for _, value in timeline.tokens_per_s])
    top_workers = max((value for _, value in timeline.workers), default=1.0) + 0.6
    plots = (
        _Plot("loss", 144, 284, *_padded_range(losses)),
        _Plot("tokens/s", 322, 432, 0.0, top_speed),
        _Plot("workers", 470, 536, 0.0, top_workers),
    )
    height = plots[-1].bottom + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{html.escape(title or _title(timeline))}</title><style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="{PLOT_LEFT}" y="34">{html.escape(title or _title(timeline))}</text>',
        *_legend(timeline.marks),
        *_time_axis(timeline.end_s, plots),
    ]
    for plot in plots:
        parts += _frame(plot, whole=plot is plots[-1])
    for mark in timeline.marks:
        x = _x(mark.at_s, timeline.end_s)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{LABELS_TOP + 34}" y2="{plots[-1].bottom}"'
        parts.append(f'<line class="mark {mark.kind}" {line}/>')
    parts += _curve(plots[0], timeline.loss, timeline.end_s, "loss")
    parts += _curve(plots[1], timeline.tokens_per_s, timeline.end_s, "speed", "area")
    parts += _curve(plots[2], _steps(timeline.workers, timeline.end_s), timeline.end_s, "workers", "steps")
    parts += _labels(timeline)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(timeline: Timeline) -> str:
    counts = {kind: sum(mark.count for mark in timeline.marks if mark.kind == kind) for kind in (LOST, JOINED)}
    parts = [
        _count(timeline.steps, "step"),
        f"{_count(counts[LOST], 'worker')} lost",
        f"{counts[JOINED]} joined",
        f"{_count(timeline.lost_steps, 'committed step')} lost",
    ]
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _legend(marks: Sequence[Mark]) -> Iterator[str]:
    """One line with the kinds of marks that occur."""
    x = float(PLOT_LEFT)
    for kind in (LOST, LEFT, JOINED, RESUMED):
        if any(mark.kind == kind for mark in marks):
            text = f"{SYMBOLS[kind]} workers {WORDS[kind]}"
            yield f'<text class="{kind}" x="{x:.0f}" y="58">{text}</text>'
            x += 6.6 * len(text) + 20


def _labels(timeline: Timeline) -> Iterator[str]:
    """Workers at every mark, and the pause after a loss. Losses are in the upper row, all else in the lower one."""
    for lost in (True, False):
        row: list[tuple[float, Mark]] = []
        for mark in timeline.marks:
            if (mark.kind == LOST) is lost:
                x = _x(mark.at_s, timeline.end_s)
                if row and row[-1][1].kind == mark.kind and x - row[-1][0] < LABEL_WIDTH:
                    before_x, before = row.pop()  # one label for both, at the first one
                    longest_s = max(before.pause_s, mark.pause_s)
                    x, mark = before_x, Mark(before.at_s, mark.kind, before.count + mark.count, longest_s)
                row.append((x, mark))
        for x, mark in row:
            sign = "+" if mark.kind in (JOINED, RESUMED) else "−"
            pause = f" ({mark.pause_s:.2g} s)" if lost else ""
            place = f'x="{min(x, PLOT_RIGHT - 20):.1f}" y="{LABELS_TOP + (10 if lost else 28)}"'
            yield f'<text class="{mark.kind} middle" {place}>{SYMBOLS[mark.kind]} {sign}{mark.count}{pause}</text>'


def _time_axis(end_s: float, plots: Sequence[_Plot]) -> Iterator[str]:
    bottom = plots[-1].bottom
    for value in _ticks(0.0, end_s, TICKS_OF_TIME):
        x = _x(value, end_s)
        for plot in plots:
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top}" y2="{plot.bottom}"/>'
        yield f'<text class="dim middle" x="{x:.1f}" y="{bottom + 18}">{value:g}</text>'
    yield f'<text class="dim end" x="{PLOT_RIGHT}" y="{bottom + 36}">seconds since the start</text>'


def _frame(plot: _Plot, whole: bool) -> Iterator[str]:
    """Grid lines with their values, and the title of one plot."""
    for value in _ticks(plot.low, plot.high, 3 if whole else TICKS_PER_PLOT, 1.0 if whole else 0.0):
        y = plot.y(value)
        yield f'<line class="grid" x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="dim end" x="{PLOT_LEFT - 8}" y="{y + 4:.1f}">{value:,g}</text>'
    yield f'<line class="axis" x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}" y1="{plot.bottom}" y2="{plot.bottom}"/>'
    yield f'<text x="{PLOT_LEFT + 2}" y="{plot.top - 8}">{plot.title}</text>'


def _curve(plot: _Plot, points: Points, end_s: float, line: str, area: str = "") -> Iterator[str]:
    """A line, and the area below it where that has a class."""
    if not points:
        return
    text = " ".join(f"{_x(time_s, end_s):.1f},{plot.y(value):.1f}" for time_s, value in points)
    if area:
        first, last = _x(points[0][0], end_s), _x(points[-1][0], end_s)
        yield f'<polygon class="{area}" points="{first:.1f},{plot.bottom} {text} {last:.1f},{plot.bottom}"/>'
    yield f'<polyline class="{line}" points="{text}"/>'


def _steps(points: Points, end_s: float) -> Points:
    """Points of a line that keeps each value until the next one, and the last one to the end."""
    corners: Points = []
    for time_s, value in points:
        if corners:
            corners.append((time_s, corners[-1][1]))
        corners.append((time_s, value))
    return [*corners, (end_s, corners[-1][1])] if corners else []


def _x(time_s: float, end_s: float) -> float:
    return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * min(time_s / end_s, 1.0)


def _above(values: Sequence[float]) -> float:
    """The top of an axis from 0."""
    return 1.12 * max([*values, 0.0]) or 1.0


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of an axis that shows these values with some room."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """Round values from low to high, at most `most` and one more, at least `least` apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough), least)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
