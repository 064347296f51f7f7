"""The run's report as data, and the table a terminal shows. `python -m distill.evals.report runs/NAME` makes it again.

build_report is a pure function of what distill.evals.run_files reads; the page is a pure function of the report.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill import files
from distill.errors import DataError, DistillError
from distill.evals import stats
from distill.evals.page import render_page
from distill.evals.results import EvalResult
from distill.evals.retention import compare_retention
from distill.evals.run_files import RunData, read_run, write_settings
from distill.evals.table import best_student, render_table
from distill.records import SCHEMA_VERSION
from distill.store import STAGES

CURVE_POINTS = 300  # longer logs are averaged over equal groups of steps
EXAMPLES = 6
EXAMPLE_CHARS = 8_000


def write_report(run_dir: Path | str, config: dict | None = None) -> dict:
    """The report, after writing report.json and report.html to the run's eval folder.

    config: the resolved config; kept beside the report, and read from there when it is not given.
    """
    run_dir = Path(run_dir)
    folder = run_dir / STAGES["eval"]
    with files.disk_errors(folder):
        if config is not None:
            write_settings(run_dir, config)
        report = build_report(read_run(run_dir))
        files.write_json(folder / "report.json", report)
        with files.replacing(folder / "report.html") as temporary:
            temporary.write_text(render_page(report), encoding="utf-8")
    return report


def build_report(data: RunData) -> dict:
    """The report: models, comparisons, gap_recovered, agreement, retention, rejected, ledger, training, examples.

    JSON values only; what is not defined is None, with a reason where there is one. Statistics: distill.evals.stats.
    """
    settings = data.config.get("eval", {})
    confidence = settings.get("confidence", 0.95)
    results = list(data.results.values())
    _require_same_prompts(results)
    edges = _length_edges(results)
    comparisons = _comparisons(results, confidence, settings.get("permutations", 10_000))
    retention = [
        row
        for result in data.retention.values()
        for row in compare_retention(result, data.retention.get(result.candidate.base, result), confidence)
    ]
    report = {
        "schema": SCHEMA_VERSION,
        "run": {"name": data.name, "commit": data.commit, "date": data.date, "confidence": confidence},
        "models": [_model(result, confidence, edges) for result in results],
        "comparisons": comparisons,
        "gap_recovered": [_gap(result, results, confidence) for result in _of_role(results, "student")],
        "agreement": data.agreement,
        "retention": retention,
        "rejected": [{"reason": reason, "traces": count} for reason, count in data.rejected.items()],
        "traces": data.traces,
        "ledger": _ledger(data.ledger, data.config.get("hardware", {}).get("price_per_device_hour")),
        "training": {name: _thinned(rows) for name, rows in data.training.items()},
        "examples": _examples(results),
        "config": data.config,
    }
    report["run"]["best_student"] = best_student(report)
    return _finite(report)


def _model(result: EvalResult, confidence: float, edges: np.ndarray) -> dict:
    candidate, accuracy = result.candidate, stats.pass_at_1(result.correctness_PK, confidence)
    fewest = int((~np.isnan(result.correctness_PK)).sum(axis=1).min())
    counts = sorted({2**i for i in range(1, fewest.bit_length())} | ({fewest} if fewest > 1 else set()))
    majority = stats.maj_at_k(result.answers, result.correctness_PK, confidence)
    verdicts = Counter(result.verdict_PK.ravel().tolist())
    return {
        "name": candidate.name,
        "role": candidate.role,
        "base": candidate.base or None,
        "loss": candidate.loss or None,
        "pass_at_1": accuracy.value,
        "ci_low": accuracy.low,
        "ci_high": accuracy.high,
        "mean_tokens": result.mean_tokens,
        "truncated_share": result.truncated_share,
        "problems": accuracy.n_problems,
        "samples_per_problem": result.verdict_PK.shape[1],
        "grader_errors": result.grader_errors,
        "verdicts": dict(verdicts),
        "pass_at_k": [{"k": k, **_row(stats.pass_at_k(result.correctness_PK, k, confidence))} for k in counts],
        "maj_at_k": {"k": result.verdict_PK.shape[1], **_row(majority)},
        "by_family": _by(result, [p.family for p in result.prompts], "family", confidence),
        "by_level": _by(result, [p.level for p in result.prompts], "level", confidence),
        "lengths": _lengths(result, edges),
    }


def _by(result: EvalResult, group_of: Sequence[Any], name: str, confidence: float) -> list[dict]:
    rows = []
    for group in sorted(set(group_of)):
        chosen_PK = result.correctness_PK[[one == group for one in group_of]]
        if not np.isnan(chosen_PK).all():
            estimate = stats.pass_at_1(chosen_PK, confidence)
            rows.append({name: group, **_row(estimate), "problems": estimate.n_problems})
    return rows


def _row(estimate: stats.Estimate) -> dict:
    return {"value": estimate.value, "ci_low": estimate.low, "ci_high": estimate.high}


def _comparisons(results: list[EvalResult], confidence: float, permutations: int) -> list[dict]:
    """Every student against teacher, base, and the students before it (response first) of its base; Holm over all."""
    rows = []
    students = _of_role(results, "student")
    for position, student in enumerate(students):
        base = student.candidate.base
        rivals = [one for one in students[:position] if one.candidate.base == base]
        named = [one for one in results if one.candidate.role == "base" and one.candidate.name == base]
        for other in [*_of_role(results, "teacher"), *named, *rivals]:
            paired = stats.paired_difference(student.correctness_PK, other.correctness_PK, confidence, permutations)
            row = {"a": student.candidate.name, "b": other.candidate.name, "difference": paired.difference}
            row |= {"ci_low": paired.low, "ci_high": paired.high, "p_value": paired.p_value}
            rows.append({**row, "method": paired.method, "problems": paired.n_problems})
    for row, adjusted in zip(rows, stats.holm([row["p_value"] for row in rows])):
        row["p_value_holm"] = adjusted
    return rows


def _gap(student: EvalResult, results: list[EvalResult], confidence: float) -> dict:
    name, base_name = student.candidate.name, student.candidate.base
    teachers = _of_role(results, "teacher")
    bases = [one for one in _of_role(results, "base") if one.candidate.name == base_name]
    if not teachers or not bases:
        missing = "teacher" if not teachers else "base"
        gap = stats.GapRecovered(None, None, None, f"the {missing} was not evaluated")
    else:
        gap = stats.gap_recovered(
            student.correctness_PK, teachers[0].correctness_PK, bases[0].correctness_PK, confidence
        )
    row = {"student": name, "value": gap.value, "ci_low": gap.low, "ci_high": gap.high}
    return {**row, "base": base_name, "reason": gap.reason or None}


def _of_role(results: list[EvalResult], role: str) -> list[EvalResult]:
    return [result for result in results if result.candidate.role == role]


def _require_same_prompts(results: list[EvalResult]) -> None:
    keys = [[prompt.key for prompt in result.prompts] for result in results]
    for result, own in zip(results, keys):
        if own != keys[0]:
            names = f"{results[0].candidate.name} and {result.candidate.name}"
            raise DataError(f"{names} were evaluated on different prompts", where="5-eval", remedy="--restart eval.")


def _length_edges(results: list[EvalResult]) -> np.ndarray:
    """Edges of length bins, two to a doubling, that hold the completions of every model."""
    lengths = np.concatenate([result.tokens_PK.ravel() for result in results])
    low, high = max(1, int(lengths.min())), max(2, int(lengths.max()))
    first, last = math.floor(2 * math.log2(low)), math.floor(2 * math.log2(high)) + 1
    return np.array([2.0 ** (i / 2) for i in range(first, last + 1)])


def _lengths(result: EvalResult, edges: np.ndarray) -> list[dict]:
    counts, _ = np.histogram(np.maximum(result.tokens_PK, 1), edges)
    shares = counts / result.tokens_PK.size
    return [{"from": float(a), "to": float(b), "share": float(s)} for a, b, s in zip(edges, edges[1:], shares)]


def _ledger(rows: list[dict], price: float | None) -> dict:
    costed = [{**row, "cost": None if price is None else row["device_s"] / 3600 * price} for row in rows]
    total = {key: sum(row[key] for row in rows) for key in ("wall_s", "device_s")}
    total["cost"] = None if price is None else total["device_s"] / 3600 * price
    return {"stages": costed, "total": total, "price_per_device_hour": price}


def _thinned(rows: list[dict]) -> list[dict]:
    """At most CURVE_POINTS rows: means over equal groups of steps, each at its last step."""
    size = math.ceil(len(rows) / CURVE_POINTS) if rows else 1
    thinned = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        values: dict[str, list[float]] = {}  # of the rows that have them: held-out traces are evaluated now and then
        for row in group:
            for key in (key for key in row if key != "step" and isinstance(row[key], int | float)):
                values.setdefault(key, []).append(row[key])
        thinned.append({"step": group[-1]["step"], **{key: sum(v) / len(v) for key, v in values.items()}})
    return thinned


def _examples(results: list[EvalResult]) -> list[dict]:
    """A few prompts with what teacher and students wrote (sample 0), of different families first.

    Half of them, as far as there are such, are prompts on which only the teacher was right: a reader must see failures.
    """
    shown = [result for result in results if result.candidate.role != "base"]
    reference = results[0]
    failed, fine = [], []
    for index in range(len(reference.prompts)):
        verdicts = [result.rows[index]["verdict"][0] for result in shown]
        (failed if verdicts[0] == "correct" and set(verdicts) != {"correct"} else fine).append(index)
    half = _spread(failed, reference, EXAMPLES // 2)
    chosen = half + _spread(fine, reference, EXAMPLES - len(half))
    return [_example(index, reference, shown) for index in chosen]


def _spread(indices: list[int], result: EvalResult, most: int) -> list[int]:
    """The first indices of each family, then the seconds, and so on, up to `most`."""
    seen: Counter[str] = Counter()
    ranked = []
    for index in indices:
        family = result.prompts[index].family
        ranked.append((seen[family], index))
        seen[family] += 1
    return [index for _, index in sorted(ranked)[:most]]


def _example(index: int, reference: EvalResult, shown: list[EvalResult]) -> dict:
    prompt = reference.prompts[index]
    samples = []
    for result in shown:
        row, text = result.rows[index], result.rows[index]["generations"][0]
        left_out = len(text) - EXAMPLE_CHARS
        samples.append(
            {
                "model": result.candidate.name,
                "role": result.candidate.role,
                "verdict": row["verdict"][0],
                "tokens": len(row["completion_ids"][0]),
                "text": text[:EXAMPLE_CHARS] + (f" ... ({left_out} more characters)" if left_out > 0 else ""),
            }
        )
    head = {"prompt": prompt.text, "answer": prompt.answer, "family": prompt.family, "level": prompt.level}
    return {**head, "samples": samples}


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def main(argv: list[str] | None = None) -> int:
    """Makes the report of a run folder again and prints its table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m distill.evals.report", description=main.__doc__)
    parser.add_argument("run_dir", metavar="runs/NAME", type=Path)
    args = parser.parse_args(argv)
    try:
        report = write_report(args.run_dir)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(render_table(report))
    print(f"\nreport: {args.run_dir / STAGES['eval'] / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
