"""Charts as inline SVG text: no script, no external font, no colour of their own (classes s0..s8, styled by the page).

Every label is escaped here. A chart is drawn in fixed coordinates and scales with the page; its data also stand in a
table beside it, so nothing is only in a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1000
_CHAR = 6.6  # width of a label character at 12 px; enough to leave room, exactness is not needed


@dataclass(frozen=True)
class Point:
    """A value with the ends of its interval (None: not known); x is used by curves only."""

    value: float
    low: float | None = None
    high: float | None = None
    x: float = 0.0


@dataclass(frozen=True)
class Series:
    """Named points in one colour: `style` is a class of the page, s0..s8."""

    name: str
    style: str
    points: Sequence[Point | None]


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def number(value: float) -> str:
    """A number as an axis shows it: 0.05, 1.5, 20, 3k."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if value else "0"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most count + 1 round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def whisker(point: Point | None, style: str, low: float = 0.0, high: float = 1.0) -> str:
    """One value with its interval on a short axis from low to high, 0 marked inside it: for a table's cell."""
    width, height = 116, 18
    to_x = lambda v: 4 + (width - 8) * _share(v, low, high)  # noqa: E731
    body = f'<line class="axis" x1="4" x2="{width - 4}" y1="{height / 2}" y2="{height / 2}"/>'
    if low < 0 < high:
        body += f'<line class="axis" x1="{to_x(0):.1f}" x2="{to_x(0):.1f}" y1="2" y2="{height - 2}"/>'
    if point is not None:
        body += _dot(point, style, to_x, height / 2, "")
    return f'<svg class="inline" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'


def dots(
    rows: Sequence[str],
    series: Sequence[Series],
    *,
    low: float = 0.0,
    high: float = 1.0,
    axis: Callable[[float], str] = percent,
    title: str,
) -> str:
    """Horizontal dots with whiskers: a band a row, one dot of each series in it (None leaves its place empty)."""
    left = 16 + _CHAR * max((len(row) for row in rows), default=0)
    band = 12 + 9 * len(series)
    height = band * len(rows) + 30
    to_x = lambda v: left + (WIDTH - left - 16) * _share(v, low, high)  # noqa: E731
    parts = [f'<rect class="band" y="{4 + r * band}" width="{WIDTH}" height="{band}"/>' for r in range(0, len(rows), 2)]
    parts.append(_vertical_grid(ticks(low, high), to_x, 4, height - 26, axis))
    for r, row in enumerate(rows):
        top = 4 + r * band
        parts.append(f'<text class="label" x="{left - 10:.1f}" y="{top + band / 2 + 4:.1f}">{escape(row)}</text>')
        for s, line in enumerate(series):
            if (point := line.points[r]) is not None:
                parts.append(_dot(point, line.style, to_x, top + 10.5 + 9 * s, f"{line.name}, {row}"))
    return _svg(height, "".join(parts), title)


def curves(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    axis: Callable[[float], str] = number,
    y_low: float | None = None,
    y_high: float | None = None,
    marks: bool = False,
    width: int = WIDTH,
) -> str:
    """Lines over x, shaded where points have an interval; `marks` draws each point. Empty text without points."""
    points = [p for line in series for p in line.points if p is not None]
    if not points:
        return ""
    height, left, top, bottom = 262, 52, 24, 226
    x_of = (lambda p: math.log2(max(p.x, 1.0))) if log_x else (lambda p: p.x)
    x_low, x_high = min(map(x_of, points)), max(map(x_of, points))
    ends = [e for p in points for e in (p.value, p.low, p.high) if e is not None]
    y_low, y_high = _padded(ends, y_low, y_high)
    to_x = lambda v: left + (width - left - 14) * _share(v, x_low, x_high)  # noqa: E731
    to_y = lambda v: bottom - (bottom - top) * _share(v, y_low, y_high)  # noqa: E731
    x_ticks = [i for i in range(math.ceil(x_low), math.floor(x_high) + 1)] if log_x else ticks(x_low, x_high, 6)
    x_text = (lambda v: number(2.0**v)) if log_x else number
    parts = [_vertical_grid(_thinned(x_ticks), to_x, top, bottom, x_text)]
    for tick in ticks(y_low, y_high):
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="label" x="{left - 6}" y="{y + 4:.1f}">{escape(axis(tick))}</text>')
    for line in series:
        parts.append(_curve(line, lambda p: to_x(x_of(p)), to_y, marks))
    parts.append(f'<text class="tick" x="{(left + width) / 2}" y="{height - 4}">{escape(x_label)}</text>')
    parts.append(f'<text class="name" x="2" y="9">{escape(y_label)}</text>')
    return _svg(height, "".join(parts), title, width)


def bars(rows: Sequence[tuple[str, float, str]], title: str, style: str = "s1") -> str:
    """Horizontal bars (label, value, text at the bar's end), the longest as wide as the chart."""
    left = 16 + _CHAR * max((len(label) for label, _, _ in rows), default=0)
    right = 24 + _CHAR * max((len(text) for _, _, text in rows), default=0)
    most = max((value for _, value, _ in rows), default=0) or 1
    parts = []
    for r, (label, value, text) in enumerate(rows):
        y, length = 4 + 24 * r, (WIDTH - left - right) * value / most
        parts.append(f'<text class="label" x="{left - 10:.1f}" y="{y + 13}">{escape(label)}</text>')
        parts.append(
            f'<rect class="{style} fill" x="{left:.1f}" y="{y}" width="{max(length, 1):.1f}" height="17" rx="2"/>'
        )
        parts.append(f'<text class="name" x="{left + length + 8:.1f}" y="{y + 13}">{escape(text)}</text>')
    return _svg(8 + 24 * len(rows), "".join(parts), title)


def _svg(height: float, body: str, title: str, width: int = WIDTH) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return f"{head}<title>{escape(title)}</title>{body}</svg>"


def _dot(point: Point, style: str, to_x: Callable[[float], float], y: float, label: str) -> str:
    x, text = to_x(point.value), f"{100 * point.value:.1f}%"
    line = ""
    if point.low is not None and point.high is not None:
        line = f'<line x1="{to_x(point.low):.1f}" x2="{to_x(point.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        text += f" [{100 * point.low:.1f}, {100 * point.high:.1f}]"
    hint = f"<title>{escape(f'{label}: ' if label else '')}{text}</title>"
    return f'<g class="{style}">{hint}{line}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/></g>'


def _curve(line: Series, to_x: Callable[[Point], float], to_y: Callable[[float], float], marks: bool) -> str:
    points = [p for p in line.points if p is not None]
    shaded = [p for p in points if p.low is not None and p.high is not None]
    body = f"<title>{escape(line.name)}</title>"
    if len(shaded) > 1:
        upper = [f"{to_x(p):.1f},{to_y(p.high):.1f}" for p in shaded]
        lower = [f"{to_x(p):.1f},{to_y(p.low):.1f}" for p in reversed(shaded)]
        body += f'<polygon points="{" ".join(upper + lower)}"/>'
    body += f'<polyline points="{" ".join(f"{to_x(p):.1f},{to_y(p.value):.1f}" for p in points)}"/>'
    if marks:
        body += "".join(f'<circle cx="{to_x(p):.1f}" cy="{to_y(p.value):.1f}" r="3"/>' for p in points)
    return f'<g class="{line.style}">{body}</g>'


def _vertical_grid(
    values: Sequence[float], to_x: Callable[[float], float], top: float, bottom: float, axis: Callable[[float], str]
) -> str:
    return "".join(
        f'<line class="grid" x1="{to_x(v):.1f}" x2="{to_x(v):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{to_x(v):.1f}" y="{bottom + 16}">{escape(axis(v))}</text>'
        for v in values
    )


def _share(value: float, low: float, high: float) -> float:
    """Where value lies between low (0) and high (1), kept inside: an interval may reach beyond the axis."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _padded(ends: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    least, most = min(ends), max(ends)
    room = 0.05 * (most - least) or 0.05 * abs(most) or 1.0
    return least - room if low is None else low, most + room if high is None else high


def _thinned(values: Sequence[float], most: int = 10) -> list[float]:
    return list(values[:: math.ceil(len(values) / most)]) if values else []
