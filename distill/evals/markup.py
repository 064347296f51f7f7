"""Small pieces of the report's HTML: tables, cards, values with their intervals. Cells given to a table are HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from distill.evals.svg import Point


def table(head: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """A table; with `total` the last row is set apart."""
    lines = []
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == len(rows) - 1 else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def details(title: str, body: str) -> str:
    return f'<details><summary>{escape(title)}</summary><div class="scroll">{body}</div></details>'


def card(what: str, big: str, more: str) -> str:
    return (
        f'<div class="card"><div class="what">{escape(what)}</div><div class="big">{escape(big)}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def point(row: dict | None, key: str = "value", x: float = 0.0) -> Point | None:
    """row[key] with the row's ci_low and ci_high; None for a missing row."""
    if row is None:
        return None
    return Point(row[key], row["ci_low"], row["ci_high"], x)


def span(row: dict, form: str = ".1f", scale: float = 100.0) -> str:
    """ "[85.0, 90.9]" of a row's ci_low and ci_high, in percent; empty when an end is not known."""
    if row["ci_low"] is None or row["ci_high"] is None:
        return ""
    return f"[{scale * row['ci_low']:{form}}, {scale * row['ci_high']:{form}}]"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def interval(row: dict | None, between: str = " ") -> str:
    """A value in percent with its interval; "undefined" (its reason on hover) for None; empty for a missing row."""
    if row is None:
        return ""
    if row["value"] is None:
        return f'<small title="{escape(row.get("reason") or "")}">undefined</small>'
    return f"{percent(row['value'])}{between}<small>{span(row)}</small>"


def plain_interval(row: dict | None, digits: int = 4) -> str:
    """A value that is no share, with its interval."""
    if row is None:
        return ""
    return f"{row['value']:.{digits}f} <small>{span(row, f'.{digits}f', 1.0)}</small>"


def duration(seconds: float) -> str:
    """ "42 s", "7 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
