"""Nine reasoning-gym families at three levels, sized so that a worked solution suits a model of a few million weights.

An item is a pure function of (family, level, seed, index). reasoning_gym makes item i of seed s from s + i alone, so
seeds are kept apart by position: (seed, level, index, attempt) maps to one integer and two seeds never share items.
Problems that the solver does not cover are skipped by trying the next attempts of the same index.
"""

import random
import re
from collections.abc import Callable
from functools import cache

import reasoning_gym
from reasoning_gym.arithmetic.products import ProductsConfig, ProductsDataset

from distill.errors import ConfigError, DataError
from distill.records import Prompt
from distill.tasks.arithmetic import TABLE
from distill.tasks.compiler import work_out
from distill.tasks.syntax import Neg, Node, Num, Op, linear, parse

ATTEMPTS = 1 << 12
LEVEL_STRIDE = 1 << 44
SEED_STRIDE = 1 << 46
MAX_INDEX = LEVEL_STRIDE // ATTEMPTS
MAX_VALUE = 9999
MAX_REASONING_TOKENS = 190  # rough ones; slips and checks may add some

_BASIC = {"operators": ("+", "-", "*"), "allow_parentheses": True, "allow_negation": False}
_WIDTHS = {1: ((2, 1),), 2: ((3, 1), (2, 2)), 3: ((3, 2),)}  # products: digits of the two factors, in either order

SETTINGS: dict[str, dict[int, dict]] = {
    "chain_sum": {
        1: {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        2: {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 3},
        3: {"min_terms": 3, "max_terms": 4, "min_digits": 3, "max_digits": 3},
    },
    "basic_arithmetic": {
        1: {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, **_BASIC},
        2: {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2, **_BASIC},
        3: {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2, **_BASIC},
    },
    "products": {1: {}, 2: {}, 3: {}},
    "gcd": {
        1: {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 30},
        2: {"min_numbers": 2, "max_numbers": 2, "min_value": 10, "max_value": 50},
        3: {"min_numbers": 3, "max_numbers": 3, "min_value": 10, "max_value": 60},
    },
    "simple_equations": {
        1: {"min_terms": 2, "max_terms": 2, "max_value": 9},
        2: {"min_terms": 2, "max_terms": 3, "max_value": 15},
        3: {"min_terms": 3, "max_terms": 4, "max_value": 20},
    },
    "leg_counting": {
        1: {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 5},
        2: {"min_animals": 3, "max_animals": 4, "min_instances": 1, "max_instances": 9},
        3: {"min_animals": 4, "max_animals": 5, "min_instances": 1, "max_instances": 12},
    },
    "spell_backward": {
        1: {"min_word_len": 3, "max_word_len": 5},
        2: {"min_word_len": 5, "max_word_len": 7},
        3: {"min_word_len": 7, "max_word_len": 10},
    },
    "letter_counting": {
        1: {"min_words": 2, "max_words": 3},
        2: {"min_words": 4, "max_words": 5},
        3: {"min_words": 6, "max_words": 7},
    },
    "count_bits": {1: {"min_n": 1, "max_n": 63}, 2: {"min_n": 32, "max_n": 255}, 3: {"min_n": 128, "max_n": 999}},
}
FAMILIES = tuple(SETTINGS)
LEVELS = (1, 2, 3)


class _UnevenProducts(ProductsDataset):
    """reasoning_gym's products with factors of different lengths, which its own settings cannot ask for."""

    def __init__(self, widths: tuple[tuple[int, int], ...]):
        super().__init__(ProductsConfig(seed=0))
        self.widths = widths

    def _generate_task(self, rng: random.Random, num_terms: int, min_value: int, max_value: int) -> tuple[str, int]:
        widths = list(rng.choice(self.widths))
        rng.shuffle(widths)
        a, b = (rng.randint(2 if width == 1 else 10 ** (width - 1), 10**width - 1) for width in widths)
        return f"{a} * {b}", a * b


@cache
def _dataset(family: str, level: int):
    if family not in SETTINGS or level not in LEVELS:
        raise ConfigError(
            "no such family or level",
            where="prompts",
            value=f"{family} level {level}",
            remedy=f"Families: {', '.join(FAMILIES)}; levels 1, 2, 3.",
        )
    if family == "products":
        return _UnevenProducts(_WIDTHS[level])
    return reasoning_gym.create_dataset(family, seed=0, size=1, **SETTINGS[family][level])


def make_problem(family: str, level: int, seed: int, index: int) -> Prompt:
    """The prompt number `index` of a seed; index below 2**32, seed any non-negative integer.

    ConfigError for an unknown family or level. The same four arguments give the same prompt on every machine.
    """
    dataset, covered = _dataset(family, level), _COVERED.get(family)
    if not 0 <= index < MAX_INDEX or seed < 0:
        raise ConfigError("index or seed out of range", where=f"{family} level {level}", value=(seed, index))
    start = seed * SEED_STRIDE + level * LEVEL_STRIDE + index * ATTEMPTS
    for position in range(start, start + ATTEMPTS):
        item = dataset[position]
        text, answer = item["question"].strip(), item["answer"]
        if covered is None or covered(text):
            prompt = Prompt(
                text=text,
                answer=answer,
                family=family,
                level=level,
                grader="exact" if family == "spell_backward" else "integer",
                source=f"reasoning_gym/{family}",
                metadata={"seed": seed, "index": index},
            )
            if family not in _LENGTH_BOUND or _is_short(prompt):
                return prompt
    where = f"{family} level {level} seed {seed}"
    raise DataError("no problem in range", where=where, value=index, remedy="Use another index.")


_LENGTH_BOUND = {"basic_arithmetic", "simple_equations", "leg_counting", "letter_counting"}
_ROUGH_TOKEN = re.compile(r" \d(?!\d)|\d{1,3}| ?[A-Za-z]+|\S|\n")


def rough_tokens(text: str) -> int:
    """About how many tokens `text` has: a word, a number of up to three digits or a sign is one."""
    return len(_ROUGH_TOKEN.findall(text))


def _is_short(prompt: Prompt) -> bool:
    return rough_tokens(work_out(prompt, random.Random(0), slip=0, confirm=0).reasoning) <= MAX_REASONING_TOKENS


def _covers_basic(text: str) -> bool:
    """No negative literal and no value above MAX_VALUE on the way."""
    if re.search(r"(?:^Calculate|[-+*(]) -\d", text):
        return False
    return _value(parse(text[len("Calculate ") : -1])) is not None


def _value(node: Node) -> int | None:
    if isinstance(node, Num):
        return node.value
    if isinstance(node, Neg):
        value = _value(node.arg)
        return None if value is None else -value
    if not isinstance(node, Op):
        return None
    left, right = _value(node.left), _value(node.right)
    if left is None or right is None:
        return None
    value = {"+": left + right, "-": left - right, "*": left * right}[node.symbol]
    return value if abs(value) <= MAX_VALUE else None


def _covers_equation(text: str) -> bool:
    """A coefficient within the product table, constants of at most four digits."""
    left, right = text.rsplit(": ", 1)[1].split(" = ")
    slope, constant = linear(parse(left))
    return 0 < abs(slope) <= TABLE and abs(constant) <= MAX_VALUE and abs(linear(parse(right))[1]) <= MAX_VALUE


def _covers_letters(text: str) -> bool:
    """A letter a-z to count, plain ASCII words."""
    return text.isascii() and re.search(r'letter "[a-z]"', text) is not None


def _covers_word(text: str) -> bool:
    """Small letters a-z only: the vocabulary of the word list has names too."""
    word = text.rsplit(" ", 1)[1]
    return word.isascii() and word.isalpha() and word.islower()


_COVERED: dict[str, Callable[[str], bool]] = {
    "basic_arithmetic": _covers_basic,
    "simple_equations": _covers_equation,
    "letter_counting": _covers_letters,
    "spell_backward": _covers_word,
}
