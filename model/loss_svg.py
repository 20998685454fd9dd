"""The loss picture of a run, as a small SVG written by hand: no plotting library is needed to look at it."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 36, 48

Point = tuple[float, float]


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / distance), math.floor(high / distance)
    return [round(i * distance, 10) for i in range(first, last + 1)]


def loss_svg(title: str, train: list[Point], val: list[Point]) -> str:
    """The picture of (step, loss) points: the training loss as a line, the validation loss as a line with dots."""
    finite = [(x, y) for x, y in train + val if math.isfinite(y)]
    if not finite:
        finite = [(0.0, 0.0)]
    x_high = max(max(x for x, _ in finite), 1.0)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    margin = 0.05 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def place(point: Point) -> Point:
        x = LEFT + point[0] / x_high * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for value in ticks(y_low, y_high):
        _, y = place((0.0, value))
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in ticks(0.0, x_high):
        x, _ = place((value, y_low))
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">loss</text>')
    parts += curve("train", [place(p) for p in train if math.isfinite(p[1])], "#7aa6d8", 0)
    val_places = [place(p) for p in val if math.isfinite(p[1])]
    parts += curve("validation", val_places, "#c0392b", 1)
    parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="#c0392b"/>' for x, y in val_places]
    return "\n".join([*parts, "</svg>"]) + "\n"


def curve(name: str, places: list[Point], colour: str, row: int) -> list[str]:
    """A line through the places, and its entry in the legend."""
    points = " ".join(f"{x},{y}" for x, y in places)
    x, y = WIDTH - RIGHT - 90, TOP + 16 + 18 * row
    return [
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
        f'<line x1="{x - 26}" y1="{y - 4}" x2="{x - 6}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>',
        f'<text x="{x}" y="{y}">{escape(name)}</text>',
    ]
