"""Drawings for the results, as SVG written by hand: no library, and a text file that shows its changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 800, 420, 64, 40, 190, 48
COLOURS = ("#4c6a92", "#c8553d", "#2a9d6f", "#8f6bb3", "#b58b00")


@dataclass(frozen=True)
class Curve:
    """One run: curves of the same name share a colour; their mean is drawn thick."""

    name: str
    values: Sequence[float]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the beginning."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def draw_curves(path: Path, label: str, curves: Sequence[Curve]) -> None:
    """Each run thin, the mean of each name thick, over the step; the first tenth is left out of the vertical range."""
    steps = len(curves[0].values)
    window = max(1, steps // 30)
    smoothed = [Curve(c.name, smooth(c.values, window)) for c in curves]
    shown = [v for c in smoothed for v in c.values[steps // 10 :]]
    low, high = min(shown), max(shown)
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def point(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / max(steps - 1, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - min(value, high)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{label} over steps (thin: runs, thick: mean over seeds)</text>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        y = point(0, value).split(",")[1]
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:.2f}</text>')
        at = (steps - 1) * i // 4
        x = point(at, low).split(",")[0]
        lines.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{at + 1}</text>')
    for index, name in enumerate(dict.fromkeys(c.name for c in curves)):
        colour = COLOURS[index % len(COLOURS)]
        own = [c.values for c in smoothed if c.name == name]
        mean = [sum(values) / len(values) for values in zip(*own, strict=True)]
        for values, width, opacity in [*((v, 0.8, 0.4) for v in own), (mean, 2.2, 1.0)]:
            points = " ".join(point(step, value) for step, value in enumerate(values))
            lines.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" '
                f'stroke-width="{width}" opacity="{opacity}"/>'
            )
        y = TOP + 20 + 22 * index
        lines.append(
            f'<line x1="{WIDTH - RIGHT + 14}" x2="{WIDTH - RIGHT + 40}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="2.2"/>'
        )
        lines.append(f'<text x="{WIDTH - RIGHT + 46}" y="{y + 4}">{name}: {mean[-1]:.3f}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")
