"""A plan as text for a person: aligned tables, then what does not fit."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.plan import Plan, Row

GB = 1e9
WIDTH = 120


def render(plan: Plan) -> str:
    """The whole plan, without a trailing newline."""
    nodes = f", {plan.gpus_per_node} a node" if plan.gpus > plan.gpus_per_node else ""
    title = f"Plan of {plan.name}: {plan.gpus} x {plan.gpu} with {plan.gpu_memory_bytes / GB:.0f} GB each{nodes}"
    parts = [
        title + "\n" + "=" * len(title),
        _table(_stage_cells(plan), left=(0, 1, 10)),
        "GB per GPU (when sampling, the cache takes what is left, up to batch_size completions)\n"
        + _table(_memory_cells(plan), left=(0, 1)),
        "GB on disk, at most\n" + _table([list(plan.disk), [_number(b / GB) for b in plan.disk.values()]], left=()),
        _paragraphs("Assumed", list(plan.assumed)),
    ]
    if plan.teacher:
        title = "Traces by the dtype of the teacher's weights: GB per GPU, tokens/s over all GPUs"
        parts.insert(3, title + "\n" + _table(_teacher_cells(plan), left=(0, 1)))
    if plan.notes:
        parts.append(_paragraphs("Notes", plan.notes))
    if plan.problems:
        parts.append(_paragraphs("Does not fit", plan.problems))
    else:
        parts.append("Everything fits.")
    return "\n\n".join(parts)


def _stage_cells(plan: Plan) -> list[list[str]]:
    head = ["stage", "model", "parameters", "active", "tokens", "FLOPs", "hours", "GPU-hours", "cost", "fits", "layout"]
    body = [_stage_row(row) for row in plan.rows]
    cost = "-" if plan.cost is None else f"{plan.cost:,.0f}"
    flops, gpu_hours = sum(row.flops for row in plan.rows), None if plan.hours is None else plan.hours * plan.gpus
    fits = "yes" if plan.fits else "NO"
    total = ["total", "", "", "", "", f"{flops:.1e}", _number(plan.hours), _number(gpu_hours), cost, fits, ""]
    return [head, *body, total]


def _stage_row(row: Row) -> list[str]:
    sizes = [_count(row.parameters), _count(row.active_parameters), _count(row.tokens), f"{row.flops:.1e}"]
    cost = "-" if row.cost is None else f"{row.cost:,.0f}"
    fits = "yes" if row.fits else "NO"
    return [row.stage, row.model, *sizes, _number(row.hours), _number(row.gpu_hours), cost, fits, row.layout]


def _memory_cells(plan: Plan) -> list[list[str]]:
    items = list(dict.fromkeys(name for row in plan.rows for name in row.memory))
    head = ["stage", "model", *items, "needs", "has"]
    body = []
    for row in plan.rows:
        cells = [_number(row.memory[name] / GB) if name in row.memory else "" for name in items]
        totals = [_number(row.memory_bytes / GB), _number(plan.gpu_memory_bytes / GB)]
        body.append([row.stage, row.model, *cells, *totals])
    return [head, *body]


def _teacher_cells(plan: Plan) -> list[list[str]]:
    items = list(plan.teacher[0].memory)
    head = ["weights", "layout", *items, "needs", "has", "fits", "tokens/s", "hours", "GPU-hours", "cost"]
    body = []
    for row in plan.teacher:
        sizes = [*(row.memory[item] for item in items), row.memory_bytes, plan.gpu_memory_bytes]
        times = [_number(value) for value in (row.tokens_per_s, row.hours, row.gpu_hours)]
        cost = "-" if row.cost is None else f"{row.cost:,.0f}"
        cells = [row.weights, row.layout, *(_number(size / GB) for size in sizes), "yes" if row.fits else "NO"]
        body.append([*cells, *times, cost])
    return [head, *body]


def _table(rows: list[list[str]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _paragraphs(title: str, lines: list[str]) -> str:
    wrapped = [textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ") for line in lines]
    return "\n".join([title, *wrapped])


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if unit != "B" else f"{value / size:.2f}B"
    return f"{value:.0f}"


def _number(value: float | None) -> str:
    """Three digits that matter, without exponents."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 or value == 0 else "<0.01"
