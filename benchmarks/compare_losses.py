"""Whether two trainings are the same, step by step: `python benchmarks/compare_losses.py A B`.

A and B are logs, students' folders or whole runs; of runs, the students that carry the same name are compared. Prints
the largest gap and the first step beyond the tolerance. Exit status: 0 the same, 1 different, 2 cannot be compared.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG, STUDENTS = "log.jsonl", "4-student"
TOLERANCE = 1e-5


class Unreadable(Exception):
    """A log that is not there, or whose rows are not those of a training."""


@dataclass(frozen=True)
class Gap:
    """Two values of one metric at one step; the gap is |a - b| / max(1, |b|): absolute for losses below 1."""

    step: int
    metric: str
    a: float
    b: float

    @property
    def size(self) -> float:
        if self.a == self.b or (math.isnan(self.a) and math.isnan(self.b)):
            return 0.0
        size = abs(self.a - self.b) / max(1.0, abs(self.b))
        return size if math.isfinite(size) else math.inf

    def __str__(self) -> str:
        return f"{self.size:.3g} at step {self.step}: {self.metric} {self.a:.9g} and {self.b:.9g}"


@dataclass(frozen=True)
class Comparison:
    """steps: how many were compared; largest: None without any; first: the first gap beyond the tolerance, or None;
    alone: steps that only one of the two has, as (in A alone, in B alone)."""

    steps: int
    largest: Gap | None
    first: Gap | None
    alone: tuple[list[int], list[int]]

    @property
    def same(self) -> bool:
        return self.steps > 0 and self.first is None and not any(self.alone)


def compare(
    a: dict[int, dict],
    b: dict[int, dict],
    *,
    metrics: Sequence[str] = ("loss",),
    tolerance: float = TOLERANCE,
    common: bool = False,
) -> Comparison:
    """The comparison of two trainings, each as {step: row}. common: steps that only one of them has are no difference.

    Unreadable when a row lacks a metric.
    """
    steps = sorted(a.keys() & b.keys())
    gaps = [Gap(step, metric, *_values(step, metric, a, b)) for step in steps for metric in metrics]
    first = next((gap for gap in gaps if not gap.size <= tolerance), None)
    alone = ([], []) if common else (sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()))
    return Comparison(len(steps), max(gaps, key=lambda gap: gap.size, default=None), first, alone)


def _values(step: int, metric: str, *rows: dict[int, dict]) -> list[float]:
    try:
        return [float(each[step][metric]) for each in rows]
    except (KeyError, TypeError, ValueError):
        known = ", ".join(sorted(set(rows[0][step]) & set(rows[1][step]) - {"step"}))
        raise Unreadable(f"step {step} has no number {metric!r} in both; both have {known}") from None


def read_log(path: Path) -> dict[int, dict]:
    """{step: row} of a log; a step that stands there twice counts as its last row. Unreadable with file and line."""
    rows: dict[int, dict] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            raise Unreadable(f"{path}, line {number}: not a row of a training: {line[:80]!r}") from None
    return rows


def logs_of(path: Path) -> dict[str, Path]:
    """{student: its log} of a run's folder; {"": the log} of a log or of a student's folder."""
    if path.is_file():
        return {"": path}
    if (path / LOG).is_file():
        return {"": path / LOG}
    found = {log.parent.name: log for log in sorted(path.glob(f"{STUDENTS}/*/{LOG}"))}
    if not found:
        raise Unreadable(f"{path}: neither a log, nor a folder with {LOG} or {STUDENTS}/*/{LOG}")
    return found


def pairs(a: Path, b: Path) -> list[tuple[str, Path, Path]]:
    """(student, log in A, log in B) of all to be compared. Unreadable when the two do not hold the same students."""
    first, second = logs_of(a), logs_of(b)
    if first.keys() != second.keys():
        if len(first) == len(second) == 1:
            return [("", *first.values(), *second.values())]
        raise Unreadable(f"{a} holds the students {sorted(first)}, {b} holds {sorted(second)}")
    return [(name, first[name], second[name]) for name in first]


def describe(name: str, found: Comparison, tolerance: float) -> str:
    """What was found, in one to three lines."""
    lines = [f"{name + ': ' if name else ''}{found.steps} steps compared, tolerance {tolerance:g}"]
    lines[0] += ": the same" if found.same else ": DIFFERENT"
    if found.largest is not None:
        lines.append(f"  largest gap {found.largest}")
    if found.first is not None:
        lines.append(f"  first beyond the tolerance: {found.first}")
    for side, steps in zip("AB", found.alone):
        if steps:
            lines.append(f"  in {side} alone: {len(steps)} steps, {steps[0]} to {steps[-1]}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare two trainings step by step.")
    parser.add_argument("a", type=Path, help="a log, a student's folder or a run's folder")
    parser.add_argument("b", type=Path, help="the one to compare with")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest |a - b| / max(1, |b|) allowed")
    parser.add_argument("--metrics", default="loss", help="columns of the log, joined by commas")
    parser.add_argument("--common", action="store_true", help="compare the steps that both have and ignore the others")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything is the same, 1 when something differs, 2 when there is nothing to compare."""
    args = parse(arguments)
    options = {"metrics": args.metrics.split(","), "tolerance": args.tolerance, "common": args.common}
    try:
        found = [(name, compare(read_log(a), read_log(b), **options)) for name, a, b in pairs(args.a, args.b)]
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    for name, comparison in found:
        print(describe(name, comparison, args.tolerance))
    return 0 if all(comparison.same for _, comparison in found) else 1


if __name__ == "__main__":
    sys.exit(main())
