"""Short questions with direct answers: what a base student knows, and what retention is measured on.

They are the primitives that worked solutions are made of (facts, spelling, joining, reversing) and two that these never
use (sorting, copying), so a student that forgets is seen to forget. Content is drawn from `rng`; split_of tells apart
what is for evaluation.
"""

import random
import string
from collections.abc import Callable
from functools import cache

from reasoning_gym.data import read_data_file

from distill.errors import ConfigError
from distill.records import Prompt
from distill.tasks.animals import LEGS
from distill.tasks.split import is_heldout

MAX_WORD_LETTERS = 10


def general_item(kind: str, rng: random.Random) -> Prompt:
    """One question of `kind`, one of KINDS, graded "exact"; deterministic given `rng`. ConfigError for another kind."""
    if kind not in _MAKERS:
        raise ConfigError("no such general kind", where="prompts", value=kind, remedy=f"Kinds: {', '.join(KINDS)}.")
    text, answer = _MAKERS[kind](rng)
    return Prompt(text=text, answer=answer, family=kind, grader="exact", source=f"general/{kind}")


@cache
def _words() -> tuple[str, ...]:
    lines = read_data_file("words3to10.txt").split()
    return tuple(word for word in lines if word.isascii() and word.isalpha() and word.islower())


@cache
def _text_words() -> tuple[str, ...]:
    words = read_data_file("in_the_year_2889.txt").replace("-", " ").split()
    cleaned = {word.strip(string.punctuation) for word in words}
    return tuple(sorted(word for word in cleaned if word.isascii() and word.isalpha()))


def _word(rng: random.Random) -> str:
    return rng.choice(_words() if rng.random() < 0.6 else _text_words())


def _number(rng: random.Random, most_digits: int = 5) -> int:
    digits = rng.randint(1, most_digits)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(low, high)))


def _copying(rng: random.Random) -> tuple[str, str]:
    draw = rng.choice((_word, _number, lambda r: rng.choice((_word, _number))(r)))
    items = " ".join(str(draw(rng)) for _ in range(rng.randint(2, 6)))
    return f"Copy: {items}", items


def _sorting(rng: random.Random) -> tuple[str, str]:
    count = rng.randint(3, 6)
    if rng.random() < 0.4:
        letters = rng.sample(string.ascii_lowercase, count)
        return f"Sort by alphabet: {', '.join(letters)}", ", ".join(sorted(letters))
    numbers = rng.sample(range(10 ** rng.randint(1, 3)), count)
    return f"Sort from small to large: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def _spelling(rng: random.Random) -> tuple[str, str]:
    thing = _word(rng) if rng.random() < 0.6 else str(_number(rng))
    return f"Spell: {thing}", " ".join(thing.lower())


def _joining(rng: random.Random) -> tuple[str, str]:
    source = rng.choice(("word", "number", "reversed", "random"))
    if source == "word":
        thing = _word(rng).lower()
    elif source == "number":
        thing = str(_number(rng))
    elif source == "reversed":
        thing = _reversed_training_word(rng)
    else:
        thing = _letters(rng, 2, MAX_WORD_LETTERS)
    return f"Join: {' '.join(thing)}", thing


def _reversed_training_word(rng: random.Random) -> str:
    """A word backwards whose question in the spell_backward family is not for evaluation: that answer stays unseen."""
    while True:
        word = rng.choice(_words())
        question = f"Spell this word backward (example: sun -> nus): {word}"
        if not is_heldout(Prompt(text=question, answer="", family="spell_backward")):
            return word[::-1]


def _reversing(rng: random.Random) -> tuple[str, str]:
    letters = _letters(rng, 2, 5)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def _facts(rng: random.Random) -> tuple[str, str]:
    return rng.choices(_FACTS, weights=_FACT_WEIGHTS)[0](rng)


def _fact_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 19), rng.randint(0, 19)
    return f"{a}+{b}=", str(a + b)


def _fact_difference(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 19), rng.randint(0, 19)
    return f"{a}-{b}=", str(a - b)


def _fact_column(rng: random.Random) -> tuple[str, str]:
    """One column of an addition with a carry, or of a subtraction with a borrow."""
    x, y = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.5:
        return f"{x}+{y}+1=", str(x + y + 1)
    upper = x if x - y - 1 >= 0 else x + 10
    return f"{upper}-{y}-1=", str(upper - y - 1)


def _fact_product(rng: random.Random) -> tuple[str, str]:
    a, b = (rng.randint(0, 15), rng.randint(0, 15)) if rng.random() < 0.8 else (rng.randint(0, 99), 10)
    return f"{a}*{b}=", str(a * b)


def _fact_product_with_carry(rng: random.Random) -> tuple[str, str]:
    a, b, carry = rng.randint(0, 9), rng.randint(2, 9), rng.randint(1, 8)
    return f"{a}*{b}+{carry}=", str(a * b + carry)


def _fact_remainder(rng: random.Random) -> tuple[str, str]:
    b, a = sorted((rng.randint(1, 60), rng.randint(1, 60)))
    return f"{a} mod {b}=", str(a % b)


def _fact_half(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(1, 999)
    return f"half of {n}", str(n // 2)


def _fact_parity(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(0, 999)
    return f"odd or even: {n}", "odd" if n % 2 else "even"


def _fact_legs(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(sorted(LEGS))
    return f"legs of a {animal}", str(LEGS[animal])


def _fact_letter_count(rng: random.Random) -> tuple[str, str]:
    word = _word(rng).lower()
    letter = rng.choice(word) if rng.random() < 0.7 else rng.choice(string.ascii_lowercase)
    return f"how many {letter} in {' '.join(word)}", str(word.count(letter))


_FACTS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _fact_sum,
    _fact_difference,
    _fact_column,
    _fact_product,
    _fact_product_with_carry,
    _fact_remainder,
    _fact_half,
    _fact_parity,
    _fact_legs,
    _fact_letter_count,
)
_FACT_WEIGHTS = (4, 4, 1, 1, 2, 4, 2, 1, 0.5, 3)  # in step with the sizes of the tables

_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copying": _copying,
    "sorting": _sorting,
    "spelling": _spelling,
    "joining": _joining,
    "reversing": _reversing,
    "facts": _facts,
}
KINDS = tuple(_MAKERS)
