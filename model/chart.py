"""Small pictures in SVG, drawn by hand for model/page.py: they take their colours from the page, so dark mode and print work.

A chart is 380 wide, about a phone: its letters are of the page's own size there, and grow with the picture elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from model.loss_svg import Point, ticks

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 40


@dataclass(frozen=True)
class Line:
    """A curve through points; kind is the class that the page gives a colour: ours, plain, limit, faint or other."""

    kind: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """Where numbers lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool = False

    def x(self, value: float) -> float:
        """Place of a value across."""
        return round(LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Place of a value down the picture."""
        if self.log:
            share = math.log(value / self.y_low) / math.log(self.y_high / self.y_low)
        else:
            share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)

    def drawable(self, point: Point) -> bool:
        """Whether a point has a place."""
        return all(map(math.isfinite, point)) and not (self.log and point[1] <= 0)


def frame_of(points: Sequence[Point], log: bool = False) -> Frame:
    """A frame with a little room around all points that have a place."""
    finite = [p for p in points if all(map(math.isfinite, p)) and not (log and p[1] <= 0)] or [(0.0, 1.0)]
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    if log:
        return Frame(
            x_low, x_high, 10.0 ** math.floor(math.log10(min(ys))), 10.0 ** math.ceil(math.log10(max(ys) * 1.01)), True
        )
    room = 0.06 * (max(ys) - min(ys)) or 1.0
    return Frame(x_low, x_high, min(ys) - room, max(ys) + room)


def label(value: float) -> str:
    """A number on an axis, short enough to end before the axis' name."""
    size = abs(value)
    if 1e4 <= size < 1e9:
        return f"{value / 1e3:g}k" if size < 1e6 else f"{value / 1e6:g}M"
    if value and (size < 1e-3 or size >= 1e9):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:g}"


def picture(description: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """The SVG element; the description is what a screen reader says."""
    return "\n".join(
        [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}">', *parts, "</svg>"]
    )


def axes(frame: Frame, x_name: str, y_name: str, x_labels: Sequence[tuple[float, str]] = ()) -> list[str]:
    """Grid, numbers and names."""
    parts = []
    if frame.log:
        low, high = round(math.log10(frame.y_low)), round(math.log10(frame.y_high))
        values = [10.0**power for power in range(low, high + 1, max((high - low) // 5, 1))]
    else:
        values = ticks(frame.y_low, frame.y_high, 5)
    for value in values:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label(value)}</text>')
    for value, text in x_labels or [(value, label(value)) for value in ticks(frame.x_low, frame.x_high, 5)]:
        parts.append(
            f'<text x="{frame.x(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_name)}</text>'
    )
    return parts


def curve(frame: Frame, line: Line) -> list[str]:
    """A line, with dots where they are asked for or where a line has but one point."""
    places = [(frame.x(x), frame.y(y)) for x, y in line.points if frame.drawable((x, y))]
    text = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline class="{line.kind}" points="{text}"/>']
    if line.dots or len(places) == 1:
        parts += [f'<circle class="{line.kind}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return parts


def line_chart(
    description: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    *,
    log: bool = False,
    band: Sequence[tuple[float, float, float]] = (),
    x_labels: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves over a common x; band is (x, low, high), an area behind them; x_labels are words instead of numbers."""
    corners = [(x, y) for x, low, high in band for y in (low, high)]
    frame = frame_of([p for line in lines for p in line.points] + corners, log)
    if x_labels:
        frame = replace(frame, x_low=frame.x_low - 0.3, x_high=frame.x_high + 0.3)
    parts = axes(frame, x_name, y_name, x_labels)
    if band := [edge for edge in band if all(map(math.isfinite, edge))]:
        upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in band]
        lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(band)]
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    for line in lines:
        parts += curve(frame, line)
    return picture(description, parts)


def strip_chart(
    description: str, rows: Sequence[tuple[str, Sequence[float]]], limits: Sequence[tuple[float, str]], x_name: str
) -> str:
    """A row of dots for each name, over upright lines at the limits; what lies beyond the last one is drawn at the edge."""
    high = 1.1 * max(limit for limit, _ in limits)
    left, step, top = 118, 30, 30
    height = top + step * len(rows) + BOTTOM

    def place(value: float) -> float:
        return round(left + min(max(value, 0.0), high) / high * (WIDTH - left - RIGHT), 1)

    parts = []
    for value, text in limits:
        x = place(value)
        parts.append(f'<line class="limit" x1="{x}" y1="{top - 8}" x2="{x}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{top - 14}" text-anchor="middle">{escape(text)}</text>')
        parts.append(f'<text x="{x}" y="{height - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for i, (name, values) in enumerate(rows):
        y = top + step * i + step / 2
        parts.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for value in values:
            kind = "bad" if not value <= high else "ours"
            parts.append(f'<circle class="{kind} many" cx="{place(value if value <= high else high)}" cy="{y}" r="4"/>')
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return picture(description, parts, height)


def bar_chart(description: str, rows: Sequence[tuple[str, float, str]], kind: str = "ours") -> str:
    """A lying bar for each (name, value, words beside it); the last one is drawn in the colour of ours."""
    left, step, top = 118, 30, 6
    height = top + step * len(rows) + 6
    longest = max(value for _, value, _ in rows)
    parts = []
    for i, (name, value, words) in enumerate(rows):
        y = top + step * i
        width = round(value / longest * (WIDTH - left - 84), 1)
        colour = kind if i == len(rows) - 1 else "other"
        parts.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="{colour}" x="{left}" y="{y + 5}" width="{width}" height="{step - 10}" rx="2"/>')
        parts.append(f'<text x="{left + width + 6}" y="{y + 19}">{escape(words)}</text>')
    return picture(description, parts, height)
