"""One solver a family: reads the prompt's text, writes the steps, returns the answer. None sees the stored answer."""

import re

from distill.errors import DataError
from distill.tasks.animals import LEGS
from distill.tasks.arithmetic import (
    add,
    add_signed,
    divide_exactly,
    multiply,
    multiply_signed,
    spell,
    subtract,
    subtract_signed,
)
from distill.tasks.scribe import Scribe
from distill.tasks.syntax import Neg, Node, Num, Op, count_operations, linear, parse, show

_SIGNED = {"+": add_signed, "-": subtract_signed, "*": multiply_signed}


def _read(pattern: str, text: str) -> re.Match:
    match = re.search(pattern, text)
    if not match:
        raise DataError("the prompt does not read like its family", where="tasks.compiler", value=text[:200])
    return match


def chain_sum(scribe: Scribe, text: str) -> str:
    """All positive terms are added, then all negative ones, then one difference is taken."""
    terms = _signed_terms(parse(_read(r"problem: (.+) =\s*$", text)[1]))
    plus, minus = [v for v in terms if v >= 0], [-v for v in terms if v < 0]
    if len(terms) > 2:
        listed = f"Plus {', '.join(map(str, plus))}."
        scribe.line(listed + (f" Minus {', '.join(map(str, minus))}." if minus else ""))
    total = _sum(scribe, plus)
    return str(subtract(scribe, total, _sum(scribe, minus)) if minus else total)


def _signed_terms(node: Node) -> list[int]:
    if isinstance(node, Num):
        return [node.value]
    if not isinstance(node, Op) or node.symbol == "*" or not isinstance(node.right, Num):
        raise DataError("not a chain of sums", where="tasks.compiler", value=show(node))
    return [*_signed_terms(node.left), node.right.value if node.symbol == "+" else -node.right.value]


def _sum(scribe: Scribe, values: list[int]) -> int:
    total = values[0]
    for value in values[1:]:
        total = add(scribe, total, value)
    return total


def basic_arithmetic(scribe: Scribe, text: str) -> str:
    """Operation by operation in order of precedence; the rest is written out while two or more operations remain."""
    tree = parse(_read(r"Calculate (.+)\.\s*$", text)[1])
    while not isinstance(tree, Num):
        tree = _reduce_once(scribe, tree)
        if count_operations(tree) > 1:
            scribe.line(f"Now {show(tree)}.")
    return str(tree.value)


def _reduce_once(scribe: Scribe, node: Node) -> Node:
    """The tree after its first operation whose operands are known, left to right, has been worked out."""
    if isinstance(node, Neg):
        return Num(-node.arg.value) if isinstance(node.arg, Num) else Neg(_reduce_once(scribe, node.arg))
    if not isinstance(node.left, Num):
        return Op(node.symbol, _reduce_once(scribe, node.left), node.right)
    if not isinstance(node.right, Num):
        return Op(node.symbol, node.left, _reduce_once(scribe, node.right))
    return Num(_SIGNED[node.symbol](scribe, node.left.value, node.right.value))


def products(scribe: Scribe, text: str) -> str:
    """By columns: one partial product a digit of the smaller factor."""
    match = _read(r"multiplication: (\d+) \* (\d+)\.", text)
    return str(multiply(scribe, int(match[1]), int(match[2])))


def gcd(scribe: Scribe, text: str) -> str:
    """Euclid's algorithm, folded over the numbers."""
    numbers = [int(n) for n in _read(r"numbers: ([\d, ]+)\.", text)[1].split(", ")]
    result = numbers[0]
    for number in numbers[1:]:
        big, small, steps = max(result, number), min(result, number), []
        head = f"gcd({result},{number})"
        while small:
            steps.append(scribe.fact(f"{big} mod {small}", big % small))
            big, small = small, big % small
        result = big
        scribe.line(f"{head}: {', '.join(steps)}, so {result}.")
    return str(result)


def simple_equations(scribe: Scribe, text: str) -> str:
    """The constant goes to the right side, then both sides are divided by the coefficient."""
    name = _read(r"(?:value of|Solve for) ([a-z])\b", text)[1]
    left, right = _read(r": ([^:=]+) = ([^:=]+)$", text).groups()
    slope, constant = linear(parse(left))
    value = linear(parse(right))[1]
    size = abs(slope)
    unknown = name if size == 1 else f"{size}*{name}"
    upper, lower = (value, constant) if slope > 0 else (constant, value)
    if constant == 0:
        product = abs(value)
        scribe.line(f"{unknown}={product}.")
    else:
        scribe.line(f"{unknown}={upper}+{-lower}." if lower < 0 else f"{unknown}={upper}-{lower}.")
        product = add_signed(scribe, upper, -lower) if lower < 0 else subtract_signed(scribe, upper, lower)
        if size > 1:
            scribe.line(f"{unknown}={product}.")
    answer = divide_exactly(scribe, product, size)
    scribe.more(f" So {name}={answer}.")
    return str(answer)


def leg_counting(scribe: Scribe, text: str) -> str:
    """Animal by animal, with the running total."""
    total = None
    for item in _read(r"if you have (.+)\?", text)[1].split(", "):
        count, name = item.split(" ", 1)
        animal = name if int(count) == 1 else name.removesuffix("s")
        if animal not in LEGS:
            raise DataError("unknown animal", where="tasks.compiler", value=name)
        legs = LEGS[animal]
        scribe.line(f"{name}: {legs} legs.")
        product = multiply(scribe, int(count), legs)
        last = scribe.lines.pop()
        scribe.more(f" {last}")
        total = product if total is None else add(scribe, total, product)
    return str(total)


def spell_backward(scribe: Scribe, text: str) -> str:
    """The letters one by one, then the same from the last to the first."""
    word = _read(r"\): (\w+)\s*$", text)[1]
    scribe.line(f"{word}:{spell(word)}.")
    back = word[::-1]
    scribe.line(scribe.said("Backward: ", " ".join(back), "", lambda: " ".join(_swapped(scribe, back))) + ".")
    return back


def _swapped(scribe: Scribe, word: str) -> str:
    """The word with two neighbouring, different letters exchanged, or its first letter doubled when there are none."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word[0] + word
    i = scribe.rng.choice(places)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def letter_counting(scribe: Scribe, text: str) -> str:
    """Word by word in small letters, with the running total."""
    match = _read(r'letter "(.)" appear in the text: "(.+)"\?', text)
    letter, total = match[1], 0
    for word in match[2].split():
        letters = word.lower()
        count = letters.count(letter)
        total += count
        stated = scribe.said(" has ", count, f"{' '.join(letters)} has ", lambda count=count: scribe.near_count(count))
        scribe.line(f"{word}:{spell(letters)}{stated}, total {total}.")
    return str(total)


def count_bits(scribe: Scribe, text: str) -> str:
    """Halve until nothing is left and count the odd numbers on the way."""
    number, count = int(_read(r"number (\d+)\?", text)[1]), 0
    start = str(number)
    while number:
        count += number & 1
        scribe.line(f"{start}: {'odd' if number & 1 else 'even'}, count {count}.")
        half = number // 2
        start = scribe.said("Half ", half, f"half of {number} is ", lambda half=half: scribe.near(half)) if half else ""
        number = half
    return str(count)
