"""Completion text to verdict: the one grader of traces and evaluations.

Order: the thinking is cut off (an answer inside it does not count), the last \\boxed{} after it is read, and the
prompt's rule compares it with the gold answer. Model text is data here: it is never evaluated, and every rule bounds
the size of what it reads.

Rules: "exact" (string, white space collapsed), "integer", "number" (exact value of an integer, decimal or fraction),
"math" (symbolic, in processes that can be killed). What the grader cannot decide is Verdict.ERROR, never WRONG.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from distill.errors import GradeError
from distill.grade_pool import MathPool
from distill.records import Prompt, Verdict

MAX_ANSWER_CHARS = 1000
MAX_TAIL_CHARS = 100_000
THINK_START, THINK_END = "<think>", "</think>"

_BOX = re.compile(r"\\boxed\s*\{")
_INTEGER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}|([+-]?[0-9]+)/([+-]?[0-9]+)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}\\]*)\}")


@dataclass(frozen=True)
class Graded:
    """The verdict, the answer that was read (None when there is none), and why in a few words."""

    verdict: Verdict
    extracted: str | None
    detail: str = ""


def extract_answer(completion_text: str, finish_reason: str) -> Graded | str:
    """The text in the last box after the thinking, or the Graded that says why there is none."""
    if finish_reason == "length":
        return Graded(Verdict.TRUNCATED, None, "the token budget ran out")
    _, end, tail = completion_text.rpartition(THINK_END)
    if not end or THINK_START in tail:
        return Graded(Verdict.TRUNCATED, None, "the thinking is not closed")
    tail = tail[-MAX_TAIL_CHARS:]
    boxes = list(_BOX.finditer(tail))
    if not boxes:
        return Graded(Verdict.UNPARSABLE, None, "no \\boxed{} after the thinking")
    answer = _until_balanced(tail, boxes[-1].end())
    if answer is None:
        return Graded(Verdict.UNPARSABLE, None, "the braces of the last \\boxed{} are not balanced")
    answer = answer.strip()
    if not answer:
        return Graded(Verdict.UNPARSABLE, None, "the last \\boxed{} is empty")
    if len(answer) > MAX_ANSWER_CHARS:
        return Graded(Verdict.UNPARSABLE, answer[:MAX_ANSWER_CHARS], f"an answer of {len(answer)} characters")
    return answer


def _until_balanced(text: str, start: int) -> str | None:
    """text[start:] up to the brace that closes the one before `start`, escaped ones not counted; None without one."""
    depth, at = 1, start
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:at]
        at += 1
    return None


def _plain(text: str) -> str:
    """NFC, white space collapsed, one pair of $ and one \\text{} around the whole answer taken off."""
    text = _without_dollars(" ".join(unicodedata.normalize("NFC", text).split()))
    match = _TEXT_COMMAND.fullmatch(text)
    return match[1].strip() if match else text


def _without_dollars(text: str) -> str:
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" else text


def _read_integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(_plain(text).replace("\u2212", "-"))
    return int(match[1] + match[2].replace(",", "")) if match else None


def _read_number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a/b or \\frac{a}{b}; no exponents, which may not fit in memory."""
    plain = _plain(text).replace("\u2212", "-")
    integer = _read_integer(plain)
    if integer is not None:
        return Fraction(integer)
    if _DECIMAL.fullmatch(plain):
        return Fraction(plain)
    match = _FRACTION.fullmatch(plain.replace(" ", ""))
    if not match:
        return None
    sign, top, bottom = (match[1], match[2], match[3]) if match[2] else ("", match[4], match[5])
    if int(bottom) == 0:
        return None
    return Fraction(int(top), int(bottom)) * (-1 if sign == "-" else 1)


_READERS: dict[str, Callable[[str], object]] = {"exact": _plain, "integer": _read_integer, "number": _read_number}
GRADERS = (*_READERS, "math")


def _compare_values(rule: str, gold_text: str, answer: str) -> Graded:
    read = _READERS[rule]
    gold = read(gold_text) if len(gold_text) <= MAX_ANSWER_CHARS else None
    if gold is None:
        return Graded(Verdict.ERROR, answer, f"the gold answer {gold_text[:80]!r} cannot be read as {rule}")
    value = read(answer)
    if value is None:
        return Graded(Verdict.UNPARSABLE, answer, f"not a plain {rule}")
    return Graded(Verdict.CORRECT if value == gold else Verdict.WRONG, answer)


def _check_rule(prompt: Prompt) -> None:
    if prompt.grader not in GRADERS:
        raise GradeError(
            "no such grader",
            where=f"prompt {prompt.key} of {prompt.source or prompt.family}",
            value=prompt.grader,
            remedy=f"Use one of {', '.join(GRADERS)}.",
        )


class Grader:
    """Grades lists of completions; owns the worker processes of the "math" rule (started when first needed).

    workers: processes, default one a core up to 8. timeout_s: limit of one symbolic comparison, tried twice.
    Use as a context manager: the processes are killed at the end.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0):
        self._pool = MathPool(workers or min(8, os.cpu_count() or 1), timeout_s)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers; the grader may be used again."""
        self._pool.close()

    def grade(self, items: Iterable[tuple[Prompt, str, str]]) -> list[Graded]:
        """One Graded for each (prompt, completion text, finish reason), in order. GradeError for an unknown rule."""
        items = list(items)
        results = [_grade_in_process(*item) for item in items]
        waiting = [i for i, result in enumerate(results) if result.detail == _NOT_COMPARED]
        if waiting:
            pairs = [(items[i][0].answer.strip(), results[i].extracted) for i in waiting]
            replies = self._pool.compare([(_without_dollars(gold), _without_dollars(pred)) for gold, pred in pairs])
            for i, reply in zip(waiting, replies, strict=True):
                results[i] = _from_reply(results[i].extracted, reply)
        return results


_NOT_COMPARED = "not compared yet"


def _grade_in_process(prompt: Prompt, completion_text: str, finish_reason: str) -> Graded:
    """The final Graded, or for a "math" answer that differs from gold as text one with the detail _NOT_COMPARED."""
    _check_rule(prompt)
    answer = extract_answer(completion_text, finish_reason)
    if isinstance(answer, Graded):
        return answer
    if prompt.grader != "math":
        return _compare_values(prompt.grader, prompt.answer, answer)
    if _plain(answer) == _plain(prompt.answer):
        return Graded(Verdict.CORRECT, answer)
    too_long = len(prompt.answer) > MAX_ANSWER_CHARS
    return Graded(Verdict.ERROR, answer, "the gold answer is too long to compare" if too_long else _NOT_COMPARED)


def _from_reply(answer: str, reply: dict) -> Graded:
    if "equal" in reply:
        return Graded(Verdict.CORRECT if reply["equal"] else Verdict.WRONG, answer)
    if reply.get("unreadable") == "answer":
        return Graded(Verdict.UNPARSABLE, answer, "not a mathematical expression")
    return Graded(Verdict.ERROR, answer, reply.get("error", "the gold answer cannot be read as mathematics"))


def grade(prompt: Prompt, completion_text: str, finish_reason: str) -> Graded:
    """The verdict on one completion. For many, or for the "math" rule, keep one Grader: it keeps its processes."""
    with Grader(workers=1) as grader:
        return grader.grade([(prompt, completion_text, finish_reason)])[0]
