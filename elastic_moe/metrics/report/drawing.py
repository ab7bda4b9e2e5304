"""Drawings of the page, without a library: PNG pictures with one pixel per value, and curves as SVG."""

from __future__ import annotations

import base64
import colorsys
import html
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 190, 70, 10, 14, 24
HOT = 3.0  # times the mean load: the end of the colour scale
MAX_COLUMNS = 800

Colour = tuple[int, int, int]


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


def thinned(items: Sequence[Any], most: int = MAX_COLUMNS) -> list[Any]:
    """Evenly chosen items, at most `most`, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of an axis that shows these values with some room."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, most: int, least: float = 0.0) -> list[float]:
    """Round values from low to high, at most `most` and one more, at least `least` apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough), least)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curve(name: str, points: Sequence[tuple[float, float]], marks: Sequence[float] = ()) -> str:
    """A heading and one line over the steps, as HTML; "" without points.

    Args:
        name: the heading.
        points: (step, value) in order of the steps.
        marks: steps at which the membership changed.
    """
    if not points:
        return ""
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    low, high = padded_range([value for _, value in points])

    def x(step: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first):.1f}"

    def y(value: float, shift: float = 0.0) -> str:
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low) + shift:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">']
    for value in ticks(low, high, 4):
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}" stroke="#e4e4e4"/>',
            f'<text x="{LEFT - 6}" y="{y(value, 4)}" text-anchor="end">{value:,g}</text>',
        ]
    top, bottom = TOP, HEIGHT - BOTTOM
    parts += [
        f'<line x1="{x(mark)}" x2="{x(mark)}" y1="{top}" y2="{bottom}" stroke="#c8553d" opacity=".5"/>'
        for mark in marks
    ]
    line = " ".join(f"{x(step)},{y(value)}" for step, value in points)
    parts += [
        f'<polyline points="{line}" fill="none" stroke="#4c6a92" stroke-width="1.6"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step {first:g}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last:g}</text></svg>',
    ]
    return f"<h3>{html.escape(name)}</h3>" + "".join(parts)
