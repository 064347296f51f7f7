"""report.json as one self-contained HTML page for people: no script, nothing loaded from anywhere.

Text that a model or a dataset wrote is escaped, and the page's own policy forbids scripts and outside resources.
"""

from __future__ import annotations

import itertools
import json
from html import escape

from distill.evals import markup as ui
from distill.evals import svg
from distill.evals.look import Look
from distill.evals.style import STYLE
from distill.evals.svg import Point, Series
from distill.evals.table import p_against, p_value_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Control characters as signs of their own: a model may write any, and a page that holds some is no text file.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)} | {127: 0x2421}


def render_page(report: dict) -> str:
    """The whole page; sections without data are left out."""
    page = _Page(report)
    sections = [
        ("results", "Results", page.results()),
        ("comparisons", "Paired comparisons", page.comparisons()),
        ("families", "Accuracy by family and level", page.groups()),
        ("training", "Training", page.training()),
        ("lengths", "Length of completions", page.lengths()),
        ("agreement", "Agreement with the teacher", page.agreement()),
        ("retention", "Retention of the base's abilities", page.retention()),
        ("rejected", "Traces kept and rejected", page.rejected()),
        ("examples", "Traces side by side", page.examples()),
        ("ledger", "What it cost", page.ledger()),
        ("config", "Settings and method", page.config()),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in sections)
    title = escape(f"Distillation report: {report['run']['name']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body><main>{page.header()}<nav>{links}</nav>{page.cards()}{body}</main></body></html>\n"
    ).translate(_VISIBLE)


# Each chart of agreement by position: field, label, how a table cell and an axis write it, bounds of the axis.
_POSITION_CHARTS = (
    ("bits_per_byte", "KL(teacher ‖ student), bits per byte", ui.plain_interval, svg.number, {"y_low": 0.0}),
    ("top1", "same most likely outcome", ui.interval, svg.percent, {"y_high": 1.0}),
)
_CURVES = {
    "loss": "Loss, nats per token",
    "eval_loss": "Loss on held-out traces, nats per token",
    "ce": "Cross-entropy, nats per token",
    "kl": "Divergence from the teacher, nats per token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens per second",
}
_METHOD = (
    "All models were scored in one harness on the same problems, with the same seeds and grader. The unit drawn "
    "at random is the problem: intervals of pass@1 are Wilson intervals with the effective sample size of the "
    "per-problem means and a t quantile; intervals of paired differences are t intervals with two pseudo-problems "
    "(Bonett and Price); the gap recovered has Fieller's interval over paired problems, and is left undefined "
    "when the teacher's lead over the base may be zero. Samples on which the grader itself failed are left out "
    "and counted, never taken as wrong."
)


class _Page:
    """The sections of one report; each method returns HTML, empty when there is nothing to show."""

    def __init__(self, report: dict):
        self.report, self.models = report, report["models"]
        self.confidence = f"{100 * report['run']['confidence']:g}%"
        self.by_name = {model["name"]: model for model in self.models}
        self.gaps = {row["student"]: row for row in report["gap_recovered"]}
        self.best = self.by_name.get(report["run"]["best_student"])
        self.teacher = next((model for model in self.models if model["role"] == "teacher"), None)
        self.look = Look(self.models)

    def header(self) -> str:
        run, headline = self.report["run"], "Evaluation of the models"
        gap = self.gaps.get(self.best["name"]) if self.best else None
        if gap and gap["value"] is not None:
            headline = f"{self.best['name']} recovers {100 * gap['value']:.0f}% of the teacher's lead over its base"
        facts = [f"run {run['name']}", run["date"][:10], f"commit {run['commit'][:10]}" if run["commit"] else ""]
        if self.models:
            first = self.models[0]
            facts.append(f"{first['problems']} held-out problems, {first['samples_per_problem']} samples of each")
        return f'<h1>{escape(headline)}</h1><p class="soft">{escape(" · ".join(filter(None, facts)))}</p>'

    def cards(self) -> str:
        cards = []
        if self.best:
            gap = self.gaps[self.best["name"]]
            value = "undefined" if gap["value"] is None else f"{100 * gap['value']:.0f}%"
            more = gap["reason"] or f"{self.confidence} interval {ui.span(gap)}"
            cards.append(ui.card("Gap recovered", value, more))
            others = [m for m in self.models if m["role"] == "teacher" or m["name"] == self.best["base"]]
            more = ", ".join(f"{m['role']} {100 * m['pass_at_1']:.1f}%" for m in others)
            cards.append(ui.card("pass@1 of the best student", f"{100 * self.best['pass_at_1']:.1f}%", more))
            teacher = f"teacher {self.teacher['mean_tokens']:.0f}, " if self.teacher else ""
            more = f"{teacher}{100 * self.best['truncated_share']:.1f}% truncated"
            cards.append(ui.card("Mean tokens of a completion", f"{self.best['mean_tokens']:.0f}", more))
        total = self.report["ledger"]["total"]
        cost = "" if total["cost"] is None else f", cost {total['cost']:,.2f}"
        if self.report["ledger"]["stages"]:
            cards.append(
                ui.card("Wall time", ui.duration(total["wall_s"]), f"{ui.duration(total['device_s'])} device{cost}")
            )
        return f'<div class="cards">{"".join(cards)}</div>'

    def results(self) -> str:
        k = self.models[0]["samples_per_problem"] if self.models else 1
        head = ["Model", f"pass@1 [{self.confidence} CI]", ""]
        head += [f"pass@{k}", f"maj@{k}"] if k > 1 else []
        head += ["Mean<br>tokens", "Truncated", "Gap recovered", "p vs<br>base", "p vs<br>response"]
        rows = [self._result_row(model, k) for model in self.models]
        errors = sum(model["grader_errors"] for model in self.models)
        note = f" {errors} samples on which the grader failed are left out." if errors else ""
        return (
            f'<p class="soft">pass@1 is the mean over problems of the share of correct samples; its interval is '
            "clustered by problem. pass@k: one of k samples is correct; maj@k: the most frequent answer is. Truncated: "
            "the token budget ran out, or the reasoning was never closed; it counts as wrong. Tokens are the model's "
            "own. Gap recovered = (student − base) / (teacher − base). p: paired permutation test, not corrected for "
            f"the number of tests.{note}</p>"
            f'<div class="panel">{ui.table(head, rows)}</div>'
        )

    def _result_row(self, model: dict, k: int) -> list[str]:
        point = Point(model["pass_at_1"], model["ci_low"], model["ci_high"])
        accuracy = f'<span class="strong">{100 * point.value:.1f}%</span><br><small>{ui.span(model)}</small>'
        cells = [self.look.who(model["name"]), accuracy, svg.whisker(point, self.look.style_of(model["name"]))]
        if k > 1:
            at_k = next((row for row in model["pass_at_k"] if row["k"] == k), None)
            cells += [ui.interval(at_k, "<br>"), ui.interval(model["maj_at_k"], "<br>")]
        gap = self.gaps.get(model["name"])
        cells += [f"{model['mean_tokens']:.1f}", ui.percent(model["truncated_share"])]
        cells.append(ui.interval(gap, "<br>"))
        return cells + [escape(p_value_text(p_against(self.report, model, other))) for other in ("base", "response")]

    def comparisons(self) -> str:
        rows = self.report["comparisons"]
        if not rows:
            return ""
        widest = max(max(abs(row["ci_low"]), abs(row["ci_high"])) for row in rows)
        cells = []
        for row in rows:
            point = Point(row["difference"], row["ci_low"], row["ci_high"])
            pair = f"{self.look.short(row['a'])} <small>minus</small>&nbsp; {self.look.short(row['b'])}"
            signed = f'<span class="strong">{100 * row["difference"]:+.1f}</span> <small>{ui.span(row, "+.1f")}</small>'
            plot = svg.whisker(point, self.look.style_of(row["a"]), -widest, widest)
            cells.append([pair, plot, signed, p_value_text(row["p_value"]), p_value_text(row["p_value_holm"])])
        head = ["Pair", "", f"Difference, points [{self.confidence} CI]", "p", "p (Holm)"]
        return (
            '<p class="soft">The same problems and seeds, compared problem by problem; two-sided sign-flip '
            "permutation test. The last column corrects for the number of tests.</p>"
            f'<div class="panel">{ui.table(head, cells)}</div>'
        )

    def groups(self) -> str:
        parts = []
        for key, title in (("family", "Family"), ("level", "Level")):
            names = sorted({row[key] for model in self.models for row in model[f"by_{key}"]})
            if len(names) < 2:
                continue
            found = {m["name"]: {row[key]: row for row in m[f"by_{key}"]} for m in self.models}
            series = [self.look.series(name, [ui.point(found[name].get(group)) for group in names]) for name in found]
            labels = [f"level {name}" if key == "level" else str(name) for name in names]
            chart = svg.dots(labels, series, title=f"pass@1 by {key}")
            rows = [
                [escape(label), *(ui.interval(found[m].get(group)) for m in found)]
                for label, group in zip(labels, names)
            ]
            table = ui.details(f"Table: pass@1 by {key}", ui.table([title, *map(escape, found)], rows))
            parts.append(f'<div class="panel">{self.look.key(found)}{chart}{table}</div>')
        return "".join(parts)

    def training(self) -> str:
        training = self.report["training"]
        known = [name for name in self.by_name if name in training]
        logs = {name: training[name] for name in [*known, *(n for n in training if n not in known)] if training[name]}
        panels = []
        for key, label in _CURVES.items():
            series = [self._curve(name, rows, key) for name, rows in logs.items()]
            series = [line for line in series if line.points]
            if series and any(point.value for line in series for point in line.points):
                chart = svg.curves(
                    series, x_label="step", y_label=label, title=f"{label} over steps", width=480, y_low=0.0
                )
                panels.append(f'<div class="panel">{chart}</div>')
        if not panels:
            return ""
        tables = "".join(_log_table(name, rows) for name, rows in logs.items())
        return f'{self.look.key(logs)}<div class="pair">{"".join(panels)}</div>{tables}'

    def _curve(self, name: str, rows: list[dict], key: str) -> Series:
        return self.look.series(name, [Point(row[key], x=row["step"]) for row in rows if row.get(key) is not None])

    def lengths(self) -> str:
        if not self.models or not self.models[0]["lengths"]:
            return ""
        series = [
            self.look.series(m["name"], [Point(share, x=x) for x, share in _cumulative(m["lengths"])])
            for m in self.models
        ]
        chart = svg.curves(
            series,
            x_label="tokens",
            y_label="share of completions up to this length",
            title="Length of completions",
            log_x=True,
            axis=svg.percent,
            y_low=0.0,
            y_high=1.0,
        )
        bins = self.models[0]["lengths"]
        rows = [
            [f"{bin['from']:.0f} to {bin['to']:.0f}", *(ui.percent(m["lengths"][i]["share"]) for m in self.models)]
            for i, bin in enumerate(bins)
        ]
        table = ui.details("Table: lengths", ui.table(["Tokens", *(escape(m["name"]) for m in self.models)], rows))
        return f'<div class="panel">{self.look.key(self.by_name)}{chart}{table}</div>'

    def agreement(self) -> str:
        rows = self.report["agreement"]
        if not rows:
            return ""
        head = [
            "Student",
            "KL(teacher ‖ student), bits per byte",
            "nats per token",
            "Same most likely outcome",
            "Traces",
            "Tokens",
            "Measured",
        ]
        cells = []
        for row in rows:
            values = [ui.plain_interval(row["bits_per_byte"]), ui.plain_interval(row["kl_per_token"])]
            values += [ui.interval(row["top1"]), f"{row['traces']}", f"{row['tokens']:,}"]
            cells.append([self.look.who(row["student"]), *values, ui.percent(row["covered_share"])])
        charts = "".join(self._by_position(rows, *what) for what in _POSITION_CHARTS)
        return (
            '<p class="soft">On completions the teacher wrote for held-out prompts, at temperature 1; intervals are '
            "clustered by completion. Measured: the share of positions at which the teacher's distribution is known; "
            "the others are left out. Where a student has another tokenizer, an outcome is a set of its tokens, tokens "
            "are its own, and bits per byte are what compares.</p>"
            f'<div class="panel">{ui.table(head, cells)}</div><div class="pair">{charts}</div>{self._coverage(rows)}'
        )

    def _by_position(self, rows: list[dict], key: str, label: str, write, axis, bounds: dict) -> str:
        series = [
            self.look.series(row["student"], [ui.point(b[key], x=max(b["from"], 1)) for b in row["by_position"]])
            for row in rows
        ]
        chart = svg.curves(
            series,
            x_label="position in the completion, bytes",
            y_label=label,
            title=label,
            log_x=True,
            axis=axis,
            marks=True,
            width=480,
            **bounds,
        )
        ranges = {b["from"]: _range(b) for row in rows for b in row["by_position"]}
        found = [{b["from"]: b[key] for b in row["by_position"]} for row in rows]
        cells = [[ranges[low], *(write(each.get(low)) for each in found)] for low in sorted(ranges)]
        table = ui.details("Table", ui.table(["Bytes before", *(escape(row["student"]) for row in rows)], cells))
        return f'<div class="panel">{chart}{table}</div>'

    def _coverage(self, rows: list[dict]) -> str:
        """Which positions have no distribution and why, of students whose tokens are not the teacher's."""
        parts = []
        for row in rows:
            kinds = [kind for kind in row["coverage"][-1] if kind != "text"]
            if row["covered_share"] == 1 and not row["coverage"][-1]["inner"]:
                continue
            cells = []
            for line in row["coverage"]:
                total = sum(line[kind] for kind in kinds)
                cells.append([escape(line["text"]), f"{total:,}", *(ui.percent(line[kind] / total) for kind in kinds)])
            table = ui.table(["Text", "Positions", *kinds], cells, total=True)
            parts.append(ui.details(f"Table: positions of {row['student']} by what is known of them", table))
        return "".join(parts)

    def retention(self) -> str:
        rows = self.report["retention"]
        if not rows:
            return ""
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        names = list(dict.fromkeys(row["model"] for row in rows))
        found = {(row["model"], row["kind"]): row for row in rows}
        points = {n: [ui.point(found.get((n, kind)), "accuracy") for kind in kinds] for n in names}
        chart = svg.dots(kinds, [self.look.series(n, points[n]) for n in names], title="Accuracy on general questions")
        head = ["Kind", *(escape(name) for name in names)]
        cells = [[escape(kind), *(self._kept(found.get((name, kind))) for name in names)] for kind in kinds]
        return (
            '<p class="soft">Short held-out questions with direct answers, answered greedily; '
            f"in brackets the paired difference from the base with its {self.confidence} interval, in points.</p>"
            f'<div class="panel">{self.look.key(names)}{chart}'
            f"{ui.details('Table: retention', ui.table(head, cells))}</div>"
        )

    def _kept(self, row: dict | None) -> str:
        if row is None:
            return ""
        change = ""
        if "difference" in row:
            ends = {"ci_low": row["difference_low"], "ci_high": row["difference_high"]}
            change = f" ({100 * row['difference']:+.1f} {ui.span(ends, '+.1f')})"
        return f"{100 * row['accuracy']:.1f}% <small>{ui.span(row)}{change}</small>"

    def rejected(self) -> str:
        traces, rejected = self.report["traces"], self.report["rejected"]
        if not traces:
            return ""
        share = traces["kept"] / traces["sampled"]
        bars = [("kept", traces["kept"], f"{traces['kept']:,} ({share:.1%})")]
        bars += [
            (r["reason"], r["traces"], f"{r['traces']:,} ({r['traces'] / traces['sampled']:.1%})") for r in rejected
        ]
        return (
            f'<p class="soft">{traces["kept"]:,} of {traces["sampled"]:,} sampled traces were kept for training.</p>'
            f'<div class="panel">{svg.bars(bars, "Traces by what became of them", "s2")}</div>'
        )

    def examples(self) -> str:
        parts = []
        for example in self.report["examples"]:
            sides = "".join(
                f'<div class="side"><header>{self.look.short(s["model"])}<span class="verdict {escape(s["verdict"])}">'
                f'{escape(s["verdict"])}</span><span class="role">{s["tokens"]:,} tokens</span></header>'
                f"<pre>{escape(s['text'])}</pre></div>"
                for s in example["samples"]
            )
            about = f"{example['family']}, level {example['level']}, answer {example['answer']}"
            parts.append(
                f'<div class="panel"><div class="role">{escape(about)}</div>'
                f'<div class="problem">{escape(example["prompt"])}</div><div class="sides">{sides}</div></div>'
            )
        return "".join(parts)

    def ledger(self) -> str:
        ledger = self.report["ledger"]
        if not ledger["stages"]:
            return ""
        priced = ledger["price_per_device_hour"] is not None
        head = ["Stage", "Wall time", "Device time", *(["Cost"] if priced else [])]
        lines = [*ledger["stages"], {"stage": "total", **ledger["total"]}]
        rows = [
            [
                escape(r["stage"]),
                ui.duration(r["wall_s"]),
                ui.duration(r["device_s"]),
                *([f"{r['cost']:,.2f}"] if priced else []),
            ]
            for r in lines
        ]
        note = (
            f"at {ledger['price_per_device_hour']:g} a device-hour" if priced else "no price per device-hour was given"
        )
        note += (
            ". Finished work of the stages that were done when this page was made; loading of models, agreement, and "
            "work that a kill threw away are not counted. Distributions are captured in the time of the traces."
        )
        return f'<div class="panel">{ui.table(head, rows, total=True)}</div><p class="foot">{note}</p>'

    def config(self) -> str:
        text = json.dumps(self.report["config"], indent=2, ensure_ascii=False)
        shown = ui.details("Resolved config", f"<pre>{escape(text)}</pre>") if self.report["config"] else ""
        return f'<p class="foot">{_METHOD}</p>{shown}'


def _cumulative(lengths: list[dict]) -> list[tuple[float, float]]:
    """(length, share of completions that are no longer) at every edge of the bins."""
    shares = itertools.accumulate((bin["share"] for bin in lengths), initial=0.0)
    return list(zip([lengths[0]["from"], *(bin["to"] for bin in lengths)], shares))


def _range(bucket: dict) -> str:
    return f"{bucket['from']} and up" if bucket["to"] is None else f"{bucket['from']} to {bucket['to'] - 1}"


def _log_table(name: str, rows: list[dict]) -> str:
    """About 25 rows of a student's log, the first and the last among them."""
    keys = ["step", *(key for key in _CURVES if key in rows[-1])]
    every = max(1, len(rows) // 24)
    chosen = [*rows[:-1:every], rows[-1]]
    cells = [["" if row.get(key) is None else f"{row[key]:.5g}" for key in keys] for row in chosen]
    return ui.details(f"Table: training log of {name}", ui.table(keys, cells))
