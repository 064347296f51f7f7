"""The report's main figures as a person reads them: the terminal's table, and how numbers are written everywhere.

Everything here takes report.json as a dict (distill.evals.report.build_report) and computes no statistics.
"""

from __future__ import annotations


def best_student(report: dict) -> str | None:
    """The student with the highest pass@1 (the first of equals); None without a student."""
    students = [model for model in report["models"] if model["role"] == "student"]
    return max(students, key=lambda model: model["pass_at_1"])["name"] if students else None


def render_table(report: dict) -> str:
    """The main figures as aligned plain text: one line a model, then why a gap is undefined, if one is."""
    confidence = f"{100 * report['run']['confidence']:g}% CI"
    head = ("model", f"pass@1 [{confidence}]", "mean tokens", "truncated", f"gap recovered [{confidence}]")
    rows = [(*head, "KL bits/byte", "same top-1", "p vs base", "p vs response")]
    close = {row["student"]: row for row in report["agreement"]}
    gaps = {row["student"]: row for row in report["gap_recovered"]}
    for model in report["models"]:
        name = f"{model['name']} ({model['role']})"
        interval = percent_interval(model["pass_at_1"], model["ci_low"], model["ci_high"])
        gap = gaps.get(model["name"])
        gap_text = "" if gap is None else percent_interval(gap["value"], gap["ci_low"], gap["ci_high"])
        length = (f"{model['mean_tokens']:.1f}", f"{model['truncated_share']:.1%}")
        near = close.get(model["name"])
        agreement = (f"{near['bits_per_byte']['value']:.4f}", f"{near['top1']['value']:.1%}") if near else ("", "")
        tests = [p_value_text(p_against(report, model, kind)) for kind in ("base", "response")]
        rows.append((name, interval, *length, gap_text, *agreement, *tests))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"gap of {row['student']} undefined: {row['reason']}" for row in gaps.values() if row["value"] is None]
    return "\n".join(lines)


def p_against(report: dict, model: dict, other: str) -> float | None:
    """The p-value of a student against its base, or of a student trained on logits against the response student of the
    same base; None where there is no such pair."""
    if model["role"] != "student":
        return None
    if other == "base":
        opponent = model["base"]
    else:
        rivals = [m["name"] for m in report["models"] if (m["loss"], m["base"]) == ("response", model["base"])]
        opponent = rivals[0] if rivals and model["loss"] != "response" else None
    for row in report["comparisons"]:
        if (row["a"], row["b"]) == (model["name"], opponent):
            return row["p_value"]
    return None


def percent_interval(value: float | None, low: float | None, high: float | None) -> str:
    """ "88.1 [85.0, 90.9]" in percent; "undefined" for None."""
    if value is None:
        return "undefined"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def p_value_text(p: float | None) -> str:
    """A p-value as text: empty for None, never a bare 0."""
    if p is None:
        return ""
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
