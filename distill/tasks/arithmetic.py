"""Arithmetic said in words from facts that a small model can know.

Facts: sums and differences of numbers below 20, products up to 15*15, digit*digit+carry. Everything longer
goes by columns of spelled digits, because a tokenizer that holds "438" as one token hides its digits. Every function
writes its steps and returns the value.
"""

from distill.errors import DataError
from distill.tasks.scribe import Scribe

TABLE = 15
SMALL = 20


def spell(text: str) -> str:
    """Each character with a space before it: spell("347") is " 3 4 7"."""
    return "".join(f" {char}" for char in text)


def is_product_fact(a: int, b: int) -> bool:
    """True when a*b is stated at once: the table up to 15*15, and factors 0, 1 and 10."""
    return max(a, b) <= TABLE or min(a, b) in (0, 1) or 10 in (a, b)


def add(scribe: Scribe, a: int, b: int) -> int:
    """a+b for non-negative a and b."""
    if max(a, b) < SMALL or 0 in (a, b):
        scribe.line(scribe.fact(f"{a}+{b}", a + b) + ".")
        return a + b
    width = max(len(str(a)), len(str(b)))
    top, bottom = str(a).zfill(width), str(b).zfill(width)
    steps, carry = [], 0
    for x, y in zip(reversed(top), reversed(bottom), strict=True):
        total = int(x) + int(y) + carry
        step = scribe.fact(f"{x}+{y}+1" if carry else f"{x}+{y}", total)
        carry = total // 10
        steps.append(step + (", carry 1." if carry and len(steps) < width - 1 else "."))
    scribe.line(f"{a}+{b}:{spell(top)} and{spell(bottom)}. {_joined(steps, str(a + b), a + b)}")
    return a + b


def subtract(scribe: Scribe, a: int, b: int) -> int:
    """a-b for non-negative a and b; the result may be negative."""
    if max(a, b) < SMALL or b == 0 or a == b:
        scribe.line(scribe.fact(f"{a}-{b}", a - b) + ".")
        return a - b
    if a < b:
        scribe.line(f"{a}-{b}=-({b}-{a}).")
        return _minus(scribe, subtract(scribe, b, a))
    width = len(str(a))
    top, bottom = str(a), str(b).zfill(width)
    steps, borrow = [], 0
    for x, y in zip(reversed(top), reversed(bottom), strict=True):
        lend = int(x) - int(y) - borrow < 0
        upper = int(x) + 10 * lend
        step = scribe.fact(f"{upper}-{y}-1" if borrow else f"{upper}-{y}", upper - int(y) - borrow)
        borrow = int(lend)
        steps.append(step + (", borrow 1." if lend else "."))
    scribe.line(f"{a}-{b}:{spell(top)} and{spell(bottom)}. {_joined(steps, str(a - b).zfill(width), a - b)}")
    return a - b


def multiply(scribe: Scribe, a: int, b: int) -> int:
    """a*b for non-negative a and b: a fact, a row of columns, or partial products of the smaller one's digits."""
    if is_product_fact(a, b):
        scribe.line(scribe.fact(f"{a}*{b}", a * b) + ".")
        return a * b
    big, small = max(a, b), min(a, b)
    if small < 10:
        return _times_digit(scribe, big, small)
    total = None
    for place, digit in enumerate(reversed(str(small))):
        if digit == "0":
            continue
        part, scale = int(digit) * 10**place, 10**place
        if digit == "1":
            scribe.line(f"{big}*{part}={big * part}.")
        else:
            _times_digit(scribe, big, int(digit))
            if place:
                scribe.more(f" {big}*{part}={big * int(digit) * scale}.")
        total = big * part if total is None else add(scribe, total, big * part)
    return total


def divide_exactly(scribe: Scribe, dividend: int, divisor: int) -> int:
    """dividend/divisor, a whole number below 100, by taking away tens of the divisor and then finding the digit."""
    quotient, rest = divmod(dividend, divisor)
    if rest or divisor < 1 or not 0 <= quotient < 100:
        found = f"{dividend}/{divisor}"
        raise DataError("not an exact division with a quotient below 100", where="tasks.arithmetic", value=found)
    if divisor == 1:
        return quotient
    done, left = 0, dividend
    while not _is_last_quotient(divisor, quotient - done):
        scribe.line(f"{divisor}*10={divisor * 10}.")
        left = subtract(scribe, left, divisor * 10)
        done += 10
    digit = quotient - done
    if scribe.rng.random() < scribe.slip:  # a search that starts one off, sees it, and goes on
        guess = digit + (scribe.rng.choice((-1, 1)) if digit > 1 else 1)
        multiply(scribe, divisor, guess)
        scribe.more(" Too big." if guess > digit else " Too small.")
    multiply(scribe, divisor, digit)
    scribe.more(" It fits.")
    return add(scribe, done, digit) if done else quotient


def _is_last_quotient(divisor: int, quotient: int) -> bool:
    return quotient <= 9 or (quotient <= TABLE and divisor <= TABLE) or quotient == 10


def _times_digit(scribe: Scribe, number: int, digit: int) -> int:
    steps, carry = [], 0
    for char in reversed(str(number)):
        total = int(char) * digit + carry
        steps.append(scribe.fact(f"{char}*{digit}+{carry}" if carry else f"{char}*{digit}", total) + ",")
        carry = total // 10
    scribe.line(f"{number}*{digit}:{spell(str(number))}. {_joined(steps, str(number * digit), number * digit)}")
    return number * digit


def _joined(steps: list[str], digits: str, value: int) -> str:
    """The column steps, then the result's digits from the most significant one, then the number they make."""
    return f"{' '.join(steps)[:-1]}:{spell(digits)}, so {value}."


def _minus(scribe: Scribe, value: int) -> int:
    scribe.more(f" Minus: {-value}.")
    return -value


def _paren(value: int) -> str:
    return f"({value})" if value < 0 else str(value)


def add_signed(scribe: Scribe, a: int, b: int) -> int:
    """a+b of any signs, first rewritten to non-negative numbers."""
    if a >= 0 and b >= 0:
        return add(scribe, a, b)
    if a < 0 and b < 0:
        scribe.line(f"{a}+({b})=-({-a}+{-b}).")
        return _minus(scribe, add(scribe, -a, -b))
    plus, minus = (b, -a) if a < 0 else (a, -b)
    scribe.line(f"{a}+{_paren(b)}={plus}-{minus}.")
    return subtract(scribe, plus, minus)


def subtract_signed(scribe: Scribe, a: int, b: int) -> int:
    """a-b of any signs, first rewritten to non-negative numbers."""
    if a >= 0 and b >= 0:
        return subtract(scribe, a, b)
    if b < 0:
        scribe.line(f"{a}-({b})={a}+{-b}.")
        return add_signed(scribe, a, -b)
    scribe.line(f"{a}-{b}=-({-a}+{b}).")
    return _minus(scribe, add(scribe, -a, b))


def multiply_signed(scribe: Scribe, a: int, b: int) -> int:
    """a*b of any signs: the signs first, then the product of the magnitudes."""
    if a >= 0 and b >= 0:
        return multiply(scribe, a, b)
    if a < 0 and b < 0:
        scribe.line(f"{a}*({b})={-a}*{-b}.")
        return multiply(scribe, -a, -b)
    if a == 0 or b == 0:
        scribe.line(f"{a}*{_paren(b)}=0.")
        return 0
    scribe.line(f"{a}*{_paren(b)}=-({abs(a)}*{abs(b)}).")
    return _minus(scribe, multiply(scribe, abs(a), abs(b)))
