"""Text to verdict, on honest and on hostile completions."""

import os
import time

import pytest

from distill.errors import GradeError
from distill.grade import Grader, extract_answer, grade
from distill.records import Prompt, Verdict

C, W, T, U, E = Verdict.CORRECT, Verdict.WRONG, Verdict.TRUNCATED, Verdict.UNPARSABLE, Verdict.ERROR


def prompt(answer, grader):
    return Prompt(text=f"q {answer}", answer=answer, family="f", grader=grader)


def boxed(answer):
    return f"some steps\n</think>\n\\boxed{{{answer}}}"


def verdict(gold, grader, answer):
    return grade(prompt(gold, grader), boxed(answer), "stop").verdict


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout_s=4.0) as made:
        yield made


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("a</think>\\boxed{3}", "stop", C),
        ("a</think>\\boxed{3}<|end|>", "stop", C),
        ("a</think>\\boxed{4} no, \\boxed{3}", "stop", C),
        ("a</think>\\boxed{3} no, \\boxed{4}", "stop", W),
        ("\\boxed{3}</think>\\boxed{4}", "stop", W),
        ("a</think>\\boxed{3}", "length", T),
        ("<think>maybe \\boxed{3}", "stop", T),
        ("a</think>b<think>\\boxed{3}", "stop", T),
        ("\\boxed{3}</think>", "stop", U),
        ("\\boxed{3}</think>the answer is 3", "stop", U),
        ("a</think>\\boxed{}", "stop", U),
        ("a</think>\\boxed{3} or \\boxed{3", "stop", U),
        ("a</think>\\boxed{{3}", "stop", U),
        ("a</think>\\boxed{\\boxed{3}}", "stop", C),
        ("a</think>\\boxed {3}", "stop", C),
        ("", "stop", T),
        ("</think>" + "x" * 300_000 + "\\boxed{3}", "stop", C),
        ("</think>" + "\\boxed{" * 20_000, "stop", U),
    ],
)
def test_only_the_last_closed_box_after_closed_thinking_counts(text, finish, expected):
    assert grade(prompt("3", "integer"), text, finish).verdict == expected


def test_extraction_keeps_nested_and_escaped_braces():
    assert extract_answer(boxed("\\frac{1}{2^{3}}"), "stop") == "\\frac{1}{2^{3}}"
    assert extract_answer(boxed("\\left\\{ x \\right."), "stop") == "\\left\\{ x \\right."


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("3", "3", C),
        ("3", " 3 ", C),
        ("3", "+3", C),
        ("3", "3.0", C),
        ("3", "$3$", C),
        ("3", "\\text{3}", C),
        ("3", "03", C),
        ("-347", "\u2212347", C),
        ("1234", "1,234", C),
        ("3", "13", W),
        ("3", "31", W),
        ("3", "-3", W),
        ("13", "3", W),
        ("3", "\u0663", U),  # ARABIC-INDIC DIGIT THREE
        ("3", "\uff13", U),  # FULLWIDTH DIGIT THREE
        ("3", "\u00b3", U),  # SUPERSCRIPT THREE
        ("1234", "12,34", U),
        ("3", "3.5", U),
        ("3", "three", U),
        ("3", "1+2", U),
        ("3", "3e0", U),
        ("3", "9" * 10_000, U),
        ("3", "__import__('os').getpid()", U),
    ],
)
def test_integers(gold, answer, expected):
    assert verdict(gold, "integer", answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("1/2", "0.5", C),
        ("0.5", "\\frac{1}{2}", C),
        ("-1/2", "-\\dfrac{2}{4}", C),
        ("0.1", "1/10", C),
        ("2", "4/2", C),
        ("1/3", "0.333333333", W),
        ("0.5", ".05", W),
        ("1", "1/0", U),
        ("1", "1e999999999", U),
        ("1", "2^{3}", U),
        ("1", "nan", U),
        ("1", "inf", U),
    ],
)
def test_numbers_are_compared_exactly(gold, answer, expected):
    assert verdict(gold, "number", answer) == expected


def test_exact_strings():
    assert verdict("derdnuh", "exact", "derdnuh") == C
    assert verdict("a, b", "exact", " a,  b ") == C
    assert verdict("derdnuh", "exact", "\\text{derdnuh}") == C
    assert verdict("derdnuh", "exact", "Derdnuh") == W
    assert verdict("caf\u00e9", "exact", "cafe\u0301") == C
    assert verdict("abc", "exact", "\u0430bc") == W  # CYRILLIC SMALL LETTER A


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5", C),
        ("$\\frac{1}{2}$", "\\frac12", C),
        ("x^2+2x+1", "(x+1)^2", C),
        ("\\{1,2\\}", "\\{2,1\\}", C),
        ("2\\sqrt{2}", "\\sqrt{8}", C),
        ("3", "13", W),
        ("x+1", "x-1", W),
        ("12", "9" * 900, W),
    ],
)
def test_symbolic_equality(grader, gold, answer, expected):
    assert grader.grade([(prompt(gold, "math"), boxed(answer), "stop")])[0].verdict == expected


def test_python_code_in_an_answer_does_not_run(grader, tmp_path):
    for code in ("__import__('os').system('touch {0}')", "open('{0}','w')", "().__class__.__base__.__subclasses__()"):
        for rule in ("math", "number", "integer", "exact"):
            item = (prompt("12", rule), boxed(code.format(tmp_path / "ran")), "stop")
            assert grader.grade([item])[0].verdict != C
    assert os.listdir(tmp_path) == []


def test_power_tower_is_killed_counted_as_error_and_hurts_no_neighbour():
    with Grader(workers=2, timeout_s=1.0) as grader:
        good = (prompt("x^2+2x+1", "math"), boxed("(x+1)^2"), "stop")
        grader.grade([good])
        tower = (prompt("12", "math"), boxed("9^{9^{9^{9^9}}}"), "stop")
        start_s = time.monotonic()
        graded = grader.grade([good, tower, good, good])
        assert [g.verdict for g in graded] == [C, E, C, C]
        assert "no answer within" in graded[1].detail
        assert time.monotonic() - start_s < 30
        assert grader.grade([good])[0].verdict == C
        processes = [worker.process for worker in grader._pool._idle]
        assert processes and all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_a_worker_that_dies_is_replaced_and_the_pair_tried_again():
    with Grader(workers=1, timeout_s=10.0) as grader:
        item = (prompt("\\frac{1}{2}", "math"), boxed("0.5"), "stop")
        grader.grade([item])
        grader._pool._idle[0].process.kill()
        assert grader.grade([item])[0].verdict == C


def test_mixed_list_keeps_its_order(grader):
    items = [
        (prompt("1/2", "number"), boxed("0.5"), "stop"),
        (prompt("x+1", "math"), boxed("1+x"), "stop"),
        (prompt("5", "integer"), boxed("6"), "stop"),
        (prompt("x+1", "math"), "no end", "length"),
        (prompt("x+1", "math"), boxed("2+x"), "stop"),
    ]
    assert [g.verdict for g in grader.grade(items)] == [C, C, W, T, W]


def test_unknown_rule_and_unreadable_gold_are_the_graders_fault():
    with pytest.raises(GradeError, match="no such grader"):
        grade(prompt("3", "vibes"), boxed("3"), "stop")
    assert verdict("three", "integer", "3") == E
    assert verdict("9" * 2000, "math", "3") == E
