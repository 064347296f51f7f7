"""Worked solutions: right answers, true steps, corrected slips, bounded length."""

import random
import re

import pytest

from distill.errors import DataError
from distill.records import Prompt
from distill.tasks.compiler import work_out
from distill.tasks.families import FAMILIES, LEVELS, make_problem, rough_tokens
from distill.tasks.syntax import Num, Op, linear, parse, show

PROBLEMS = 300
CELLS = [(family, level) for family in FAMILIES for level in LEVELS]
SUM_TEXT = "State the final answer to the following arithmetic problem: {} ="
STATEMENT = re.compile(r"(?<![\w*+)-])(\(?-?\d[-+*()\d]*(?: mod \d+)?)=(-?[\d(][-+*()\d]*)")


def problems(family, level, count=PROBLEMS, seed=11):
    return [make_problem(family, level, seed, index) for index in range(count)]


def prompt_of(family, text, answer="?"):
    return Prompt(text=text, answer=answer, family=family, level=1)


def clean(family, text):
    return work_out(prompt_of(family, text), random.Random(0), slip=0, confirm=0)


def value_of(text):
    """Value of an arithmetic text, by this test's own walk over the tree."""
    if " mod " in text:
        a, b = text.split(" mod ")
        return int(a) % int(b)

    def walk(node):
        if isinstance(node, Num):
            return node.value
        if not isinstance(node, Op):
            return -walk(node.arg)
        left, right = walk(node.left), walk(node.right)
        return left + right if node.symbol == "+" else left - right if node.symbol == "-" else left * right

    return walk(parse(text))


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_solver_reaches_the_generators_answer_on_every_problem(family, level):
    for i, prompt in enumerate(problems(family, level)):
        assert work_out(prompt, random.Random(i)).answer == prompt.answer, prompt.text


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_answer_is_right_even_when_every_step_slips(family, level):
    corrections = 0
    for i, prompt in enumerate(problems(family, level, 100)):
        worked = work_out(prompt, random.Random(i), slip=1.0, confirm=0.0)
        assert worked.answer == prompt.answer
        corrections += worked.reasoning.count(", not ")
    assert corrections >= 100


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_solver_never_reads_the_stored_answer(family, level):
    for prompt in problems(family, level, 20):
        blind = Prompt(text=prompt.text, answer="nonsense", family=family, level=level)
        assert work_out(blind, random.Random(5)) == work_out(prompt, random.Random(5))


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_every_equation_said_is_true_without_slips(family, level):
    for i, prompt in enumerate(problems(family, level, 100)):
        reasoning = work_out(prompt, random.Random(i), slip=0.0, confirm=0.3).reasoning
        for left, right in STATEMENT.findall(reasoning):
            assert value_of(left) == value_of(right), (reasoning, left, right)


@pytest.mark.parametrize("family", ["chain_sum", "basic_arithmetic", "products", "gcd", "leg_counting"])
def test_every_false_equation_is_corrected_at_once(family):
    slips = 0
    for i, prompt in enumerate(problems(family, 3, 100)):
        reasoning = work_out(prompt, random.Random(i), slip=0.5, confirm=0.0).reasoning
        for match in STATEMENT.finditer(reasoning):
            left, right = match.groups()
            if value_of(left) != value_of(right):
                slips += 1
                told = reasoning[match.end() :]
                assert told.startswith(f". Check: {left}={value_of(left)}, not {right}"), (reasoning, left, right)
    assert slips > 100


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_clean_reasoning_is_short(family, level):
    lengths = [rough_tokens(work_out(p, random.Random(0), 0, 0).reasoning) for p in problems(family, level)]
    assert max(lengths) <= 210
    assert sum(lengths) / len(lengths) <= 150


def test_mean_length_over_all_families_is_about_sixty_tokens():
    lengths = [
        rough_tokens(work_out(p, random.Random(i)).reasoning) for c in CELLS for i, p in enumerate(problems(*c, 50))
    ]
    assert 45 <= sum(lengths) / len(lengths) <= 75
    assert max(lengths) <= 270


def test_same_rng_gives_the_same_text_and_slips_come_at_the_asked_rate():
    prompts = problems("products", 3, 200)
    texts = [work_out(p, random.Random(3)).reasoning for p in prompts]
    assert texts == [work_out(p, random.Random(3)).reasoning for p in prompts]
    slipped = "\n".join(work_out(p, random.Random(i), slip=0.1, confirm=0.2).reasoning for i, p in enumerate(prompts))
    facts = len(re.findall(r"(?<!Check: )(?<!\d)\d[*+]\d[+*\d]*=", slipped))
    assert 0.06 < slipped.count(", not ") / facts < 0.14
    assert 0.14 < slipped.count(", yes") / facts < 0.26


def test_column_addition_is_said_digit_by_digit():
    worked = clean("chain_sum", SUM_TEXT.format("347 + 285"))
    assert worked.reasoning == "347+285: 3 4 7 and 2 8 5. 7+5=12, carry 1. 4+8+1=13, carry 1. 3+2+1=6: 6 3 2, so 632."
    assert worked.answer == "632"


def test_column_subtraction_borrows_and_may_end_below_zero():
    worked = clean("chain_sum", SUM_TEXT.format("285 - 632"))
    assert worked.reasoning == (
        "285-632=-(632-285).\n"
        "632-285: 6 3 2 and 2 8 5. 12-5=7, borrow 1. 13-8-1=4, borrow 1. 6-2-1=3: 3 4 7, so 347. Minus: -347."
    )
    assert worked.answer == "-347"


def test_borrow_through_zeros():
    worked = clean("chain_sum", SUM_TEXT.format("1000 - 1"))
    assert "10-1=9, borrow 1. 10-0-1=9, borrow 1. 10-0-1=9, borrow 1. 1-0-1=0: 0 9 9 9, so 999." in worked.reasoning


def test_product_by_partial_products():
    worked = clean(
        "products", "Solve the following multiplication: 36 * 47. Give only the result as your final answer."
    )
    assert worked.reasoning == (
        "47*6: 4 7. 7*6=42, 4*6+4=28: 2 8 2, so 282.\n"
        "47*3: 4 7. 7*3=21, 4*3+2=14: 1 4 1, so 141. 47*30=1410.\n"
        "282+1410: 0 2 8 2 and 1 4 1 0. 2+0=2. 8+1=9. 2+4=6. 0+1=1: 1 6 9 2, so 1692."
    )
    assert worked.answer == "1692"


def test_precedence_and_signs_in_trees():
    assert clean("basic_arithmetic", "Calculate 3 + 4 * ( 2 - 5 ).").reasoning == (
        "2-5=-3.\nNow 3+4*(-3).\n4*(-3)=-(4*3).\n4*3=12. Minus: -12.\n3+(-12)=3-12.\n3-12=-9."
    )
    assert clean("basic_arithmetic", "Calculate 10 - ( 4 - 3 ) - 2.").answer == "7"
    assert clean("basic_arithmetic", "Calculate ( 1 - 5 ) * ( 2 - 9 ).").answer == "28"
    assert clean("basic_arithmetic", "Calculate -( 7 - 9 ) - -3.").answer == "5"


def test_equation_with_the_unknown_subtracted():
    worked = clean("simple_equations", "Solve for m: 48 - 64*m = -1104")
    assert worked.answer == "18"  # 64 * 18 = 1152 = 48 + 1104
    assert worked.reasoning.startswith("64*m=48+1104.\n") and worked.reasoning.endswith("10+8=18. So m=18.")


def test_euclid_legs_bits_and_letters_by_hand():
    gcd = "Find the Greatest Common Divisor (GCD) of these numbers: 48, 84, 30. Give only the GCD as your final answer."
    assert clean("gcd", gcd).reasoning == (
        "gcd(48,84): 84 mod 48=36, 48 mod 36=12, 36 mod 12=0, so 12.\ngcd(12,30): 30 mod 12=6, 12 mod 6=0, so 6."
    )
    legs = "how many legs are there in total if you have 3 praying mantiss, 1 woodlouse, 2 snakes?"
    assert clean("leg_counting", legs).answer == "32"  # 18 + 14 + 0
    bits = "How many 1 bits are there in the binary representation of the number 437?"
    assert clean("count_bits", bits).answer == "6"  # 110110101
    letters = 'How many times does the letter "s" appear in the text: "Smith Was asked"?'
    assert clean("letter_counting", letters).reasoning == (
        "Smith: s m i t h has 1, total 1.\nWas: w a s has 1, total 2.\nasked: a s k e d has 1, total 3."
    )


@pytest.mark.parametrize("text", ["2 +", "(2", "2 2", "2 / 3", "__import__('os')", "٣ + 1", "1" * 500, ""])
def test_parser_refuses_what_is_no_expression(text):
    with pytest.raises(DataError):
        parse(text)


def test_shown_tree_has_the_same_value_as_the_tree():
    rng = random.Random(9)

    def tree(depth):
        if depth == 0 or rng.random() < 0.2:
            return Num(rng.randint(-9, 9))
        return Op(rng.choice("+-*"), tree(depth - 1), tree(depth - 1))

    for _ in range(300):
        node = tree(4)
        plain = f"({show(node)})" if isinstance(node, Num) else show(node)
        assert value_of(plain) == value_of(show(parse(plain)))
        assert value_of(plain) == _direct(node)


def _direct(node):
    if isinstance(node, Num):
        return node.value
    a, b = _direct(node.left), _direct(node.right)
    return {"+": a + b, "-": a - b, "*": a * b}[node.symbol]


def test_linear_form_and_its_limits():
    assert linear(parse("2*(3 - x) + 4*x - 5")) == (2, 1)
    assert linear(parse("-x - 4")) == (-1, -4)
    with pytest.raises(DataError, match="not linear"):
        linear(parse("x*x"))


def test_unknown_family_and_foreign_text_are_errors():
    with pytest.raises(DataError, match="no worked solutions"):
        work_out(prompt_of("sudoku", "x"), random.Random(0))
    with pytest.raises(DataError, match="does not read like its family"):
        work_out(prompt_of("gcd", "What is the capital of France?"), random.Random(0))
