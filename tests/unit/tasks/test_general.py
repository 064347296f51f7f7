"""Direct questions: answers checked by an independent reading of the question."""

import itertools
import random
import re

import pytest
from reasoning_gym.data import read_data_file

from distill.errors import ConfigError
from distill.records import Prompt
from distill.tasks.general import KINDS, general_item
from distill.tasks.split import is_heldout

LEGS = {"spider": 8, "cat": 4, "snake": 0, "duck": 2, "crab": 10, "woodlouse": 14, "starfish": 5, "bee": 6}


def items(kind, count=500):
    rng = random.Random(21)
    return [general_item(kind, rng) for _ in range(count)]


def test_the_same_rng_gives_the_same_item_and_an_unknown_kind_is_refused():
    for kind in KINDS:
        assert general_item(kind, random.Random(4)) == general_item(kind, random.Random(4))
    with pytest.raises(ConfigError, match="no such general kind"):
        general_item("poetry", random.Random(0))


def test_copying_spelling_joining_and_reversing():
    for p in items("copying"):
        assert p.text == f"Copy: {p.answer}"
    for p in items("spelling"):
        assert p.answer.replace(" ", "") == p.text.removeprefix("Spell: ").lower()
        assert all(len(part) == 1 for part in p.answer.split(" "))
    for p in items("joining"):
        assert p.answer == p.text.removeprefix("Join: ").replace(" ", "")
    for p in items("reversing"):
        assert p.text.removeprefix("Reverse: ").split()[::-1] == p.answer.split() and len(p.answer.split()) <= 5


def test_sorting_keeps_the_items_and_orders_them():
    for p in items("sorting"):
        given, answer = p.text.split(": ")[1].split(", "), p.answer.split(", ")
        key = int if given[0].isdigit() else str
        assert sorted(given) == sorted(answer) and 3 <= len(given) <= 6
        assert all(key(a) < key(b) for a, b in itertools.pairwise(answer))


def test_facts_are_true():
    kinds = set()
    for p in items("facts", 4000):
        text, answer = p.text, p.answer
        if match := re.fullmatch(r"(\d+)([-+*])(\d+)(?:([-+])(\d+))?=", text):
            a, symbol, b, second, c = match.groups()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[symbol]
            value += int(c) * (1 if second == "+" else -1) if second else 0
            assert int(answer) == value
        elif match := re.fullmatch(r"(\d+) mod (\d+)=", text):
            a, b = map(int, match.groups())
            assert a - a // b * b == int(answer) and 0 < b <= a < 100
        elif match := re.fullmatch(r"half of (\d+)", text):
            assert int(match[1]) - 2 * int(answer) in (0, 1)
        elif match := re.fullmatch(r"odd or even: (\d+)", text):
            assert answer == ("odd" if match[1][-1] in "13579" else "even")
        elif match := re.fullmatch(r"legs of a ([a-z ]+)", text):
            assert LEGS.get(match[1], int(answer)) == int(answer)
        else:
            letter, letters = re.fullmatch(r"how many ([a-z]) in ([a-z ]+)", text).groups()
            assert sum(char == letter for char in letters.split()) == int(answer)
        kinds.add(re.sub(r"\d+|[a-z]+(?= in)|(?<=in ).*|(?<=of a ).*", "#", text))
    assert len(kinds) >= 10  # every template was drawn


def test_reversed_words_to_join_never_give_away_a_heldout_spelling():
    words = set(read_data_file("words3to10.txt").split())
    text_words = set(re.findall(r"[a-z]+", read_data_file("in_the_year_2889.txt").lower()))
    reversed_words = 0
    for p in items("joining", 3000):
        word = p.answer[::-1]
        if len(word) < 5 or word not in words or p.answer in words | text_words:
            continue  # too short to tell from chance letters, or a word in its own right
        reversed_words += 1
        question = f"Spell this word backward (example: sun -> nus): {word}"
        assert not is_heldout(Prompt(text=question, answer="", family="spell_backward"))
    assert reversed_words > 300
