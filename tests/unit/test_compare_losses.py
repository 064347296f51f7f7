"""The comparison of two trainings: what counts as the same, what it prints, how it ends."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare_losses import compare, main, read_log

ROOT = Path(__file__).resolve().parents[2]


def rows(*losses, first=1):
    return {step: {"step": step, "loss": loss, "kl": loss / 2} for step, loss in enumerate(losses, first)}


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in values.values()))
    return path


def test_the_gap_is_absolute_below_one_and_relative_above():
    found = compare(rows(0.5, 8.0, 0.25), rows(0.5 + 3e-6, 8.0 + 4e-5, 0.25), tolerance=4.9e-6)
    assert found.largest.step == 2 and found.largest.size == pytest.approx(5e-6, rel=1e-3)
    assert found.first.step == 2 and not found.same and found.steps == 3
    assert compare(rows(0.5, 8.0), rows(0.5 + 3e-6, 8.0 + 4e-5), tolerance=5.1e-6).same


def test_first_is_the_first_beyond_the_tolerance_and_not_the_largest():
    found = compare(rows(1.0, 1.0, 1.0), rows(1.0, 1.01, 1.5), tolerance=1e-3)
    assert (found.first.step, found.largest.step) == (2, 3)


def test_a_missing_step_is_a_difference_unless_only_common_steps_are_asked_for():
    a, b = rows(1.0, 2.0, 3.0), rows(2.0, 3.0, 4.0, first=2)
    found = compare(a, b)
    assert found.alone == ([1], [4]) and found.first is None and not found.same
    assert compare(a, b, common=True).same
    assert not compare(a, rows(first=9), common=True).same  # nothing in common is not the same


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_beyond_any_tolerance(bad):
    found = compare(rows(1.0, 1.0), rows(1.0, bad), tolerance=1e30)
    assert found.first.step == 2 and found.largest.size == math.inf
    assert compare(rows(bad), rows(bad)).same


def test_other_metrics_are_compared_and_a_missing_one_is_named(tmp_path, capsys):
    a, b = rows(1.0), {1: {"step": 1, "loss": 1.0, "kl": 0.6}}
    assert compare(a, b).same and not compare(a, b, metrics=["loss", "kl"]).same
    paths = [write(tmp_path / name, values) for name, values in (("a.jsonl", a), ("b.jsonl", b))]
    assert main([*map(str, paths), "--metrics", "loss,lr"]) == 2
    assert "step 1 has no number 'lr' in both; both have kl, loss" in capsys.readouterr().err


def test_whole_runs_are_compared_student_by_student(tmp_path, capsys):
    for run, loss in (("one", 1.0), ("two", 1.2)):
        write(tmp_path / run / "4-student" / "same" / "log.jsonl", rows(2.0, 1.0))
        write(tmp_path / run / "4-student" / "moved" / "log.jsonl", rows(2.0, loss))
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    out = capsys.readouterr().out
    assert "same: 2 steps compared, tolerance 1e-05: the same\n" in out
    assert "moved: 2 steps compared, tolerance 1e-05: DIFFERENT\n" in out
    assert "first beyond the tolerance: 0.167 at step 2: loss 1 and 1.2" in out
    write(tmp_path / "two" / "4-student" / "third" / "log.jsonl", rows(1.0))
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "third" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]", '{"loss": 1}', '{"step": "x", "loss": 1}', "\xff"])
def test_a_damaged_log_is_named_with_its_line(tmp_path, capsys, text):
    good = write(tmp_path / "good.jsonl", rows(1.0))
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"step": 1, "loss": 1}\n' + text.encode("latin-1") + b"\n")
    assert main([str(good), str(bad)]) == 2
    assert "bad.jsonl" in capsys.readouterr().err
    assert main([str(good), str(tmp_path / "absent")]) == 2


def test_a_step_that_stands_twice_counts_as_its_last_row(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 1, "loss": 6}\n')
    assert read_log(path) == {1: {"step": 1, "loss": 6}}


@pytest.mark.parametrize("how", [["benchmarks/compare_losses.py"], ["-m", "benchmarks.compare_losses"]], ids=str)
def test_the_command_ends_with_the_verdict(tmp_path, how):
    a, b = (write(tmp_path / name / "log.jsonl", rows(1.0, value)) for name, value in (("a", 0.5), ("b", 0.5001)))
    command = [sys.executable, *how, str(a.parent), str(b)]
    for options, status in ([], 1), (["--tolerance", "1e-3"], 0):
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and "largest gap 0.0001 at step 2" in done.stdout
