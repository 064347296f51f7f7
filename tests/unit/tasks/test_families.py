"""Problems of the nine families: pure functions of their four numbers, in range, and split by content."""

import re

import pytest

from distill.errors import ConfigError
from distill.records import Prompt
from distill.tasks.families import FAMILIES, LEVELS, MAX_INDEX, make_problem
from distill.tasks.split import is_heldout, split_of

CELLS = [(family, level) for family in FAMILIES for level in LEVELS]


def texts(family, level, count=200, seed=5):
    return [make_problem(family, level, seed, i).text for i in range(count)]


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_a_problem_is_a_pure_function_of_its_four_numbers(family, level):
    first = make_problem(family, level, 5, 17)
    make_problem(family, level, 6, 3)
    assert make_problem(family, level, 5, 17) == first
    assert (first.family, first.level, first.source) == (family, level, f"reasoning_gym/{family}")
    assert first.grader == ("exact" if family == "spell_backward" else "integer")
    assert first.answer.strip() and first.text == first.text.strip()


@pytest.mark.parametrize("family", ["chain_sum", "simple_equations", "leg_counting", "letter_counting"])
def test_seeds_do_not_share_problems(family):
    """Item i of seed s is f(s + i) in the library: neighbouring seeds must not be the same stream shifted by one."""
    one, two = set(texts(family, 3, 100, seed=1)), set(texts(family, 3, 100, seed=2))
    assert len(one & two) <= 1


def test_levels_are_not_the_same_draw_at_three_sizes():
    starts = [re.search(r'text: "(\w+ \w+)', make_problem("letter_counting", lv, 5, 40).text)[1] for lv in LEVELS]
    assert len(set(starts)) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_products_have_the_digits_of_their_level(level):
    widths = {
        tuple(sorted(len(n) for n in re.search(r": (\d+) \* (\d+)\.", t).groups())) for t in texts("products", level)
    }
    assert widths == {1: {(1, 2)}, 2: {(1, 3), (2, 2)}, 3: {(2, 3)}}[level]


@pytest.mark.parametrize("level", LEVELS)
def test_basic_arithmetic_has_no_negative_literal_and_no_division(level):
    for text in texts("basic_arithmetic", level):
        assert "/" not in text
        assert not re.search(r"(^Calculate|[-+*(]) -\s?\d", text), text


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_of_other_families_are_in_their_range(level):
    most_gcd, most_bits = {1: 50, 2: 99, 3: 99}[level], {1: 63, 2: 255, 3: 999}[level]
    for text in texts("gcd", level):
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        assert len(numbers) == (3 if level == 3 else 2) and max(numbers) <= most_gcd
    assert max(int(re.search(r"number (\d+)", text)[1]) for text in texts("count_bits", level)) <= most_bits
    for text in texts("spell_backward", level):
        word = text.rsplit(" ", 1)[1]
        low, high = {1: (3, 5), 2: (5, 7), 3: (7, 10)}[level]
        assert re.fullmatch("[a-z]+", word) and low <= len(word) <= high
    for text in texts("letter_counting", level):
        assert re.search(r'letter "[a-z]"', text) and text.isascii()


def test_unknown_family_level_and_index_are_refused():
    for arguments in (("sudoku", 1, 0, 0), ("gcd", 4, 0, 0), ("gcd", 1, 0, MAX_INDEX), ("gcd", 1, -1, 0)):
        with pytest.raises(ConfigError):
            make_problem(*arguments)


def test_one_prompt_in_ten_is_heldout_and_the_rule_sees_content_only():
    prompts = [make_problem(family, level, 5, i) for family, level in CELLS for i in range(100)]
    distinct = {p.key: p for p in prompts}.values()
    assert 0.08 < sum(is_heldout(p) for p in distinct) / len(distinct) < 0.12
    for p in prompts[::7]:
        spaced = Prompt(
            text="  " + p.text.replace(" ", "\n  ") + " ", answer="", family="other", level=9, source="file"
        )
        assert split_of(spaced) == split_of(p)


def test_split_of_known_prompts_never_changes():
    """Hand-checked against sha256sum: the bundled models were trained under this rule."""
    expected = {"9+5=": "train", "half of 345": "train", "Reverse: a b": "heldout"}
    found = {text: split_of(Prompt(text=text, answer="", family="facts")) for text in expected}
    assert found == expected
