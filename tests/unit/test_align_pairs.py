"""Laws of the pair mask: its answers are the tokenizer's own, with a word rule, a small memory, and for any bytes."""

import numpy as np
import pytest
from align_world import byte_fallback, byte_level, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align_tables import random_pair

from distill.align_bytes import ByteTokenizer
from distill.align_pairs import PairMask
from distill.align_words import WordCuts, _shape
from teachers.tiny.tokenizers import SPECS, build

WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def stays(tokenizer: ByteTokenizer, before: int, after: int) -> bool:
    """The definition: encoded together they are what they are apart."""
    both, alone = tokenizer.encode_pieces(
        [tokenizer.bytes_V[before] + tokenizer.bytes_V[after], tokenizer.bytes_V[before]]
    )
    return both.tolist() in ([before, after], [*alone.tolist(), after])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 22]))
def test_answers_are_the_definitions_also_when_the_memory_is_too_small(seed, bits):
    tokenizer = random_pair(seed)[0]
    mask, rng = PairMask(tokenizer, bits), np.random.default_rng(seed)
    for _ in range(3):
        before, after = rng.integers(len(tokenizer) - 5, size=(2, 50))
        expected = [stays(tokenizer, int(a), int(b)) for a, b in zip(before, after)]
        assert mask.valid(before, after).tolist() == expected
    assert mask.counts[0] == 150 and mask.counts[2] <= 150


@pytest.fixture(scope="module")
def with_words():
    lines = [
        'it\'s a test of 1234 words,\n\n  and  "some" (signs)...',
        "She'd say: x_1 = 25/3; caf\u00e9 \u4f60\u597d!\r\n\tend",
    ] * 30
    return [ByteTokenizer(build(SPECS[name], lines)) for name in ("qwen", "llama", "teacher")]


def test_with_a_word_rule_every_pair_of_a_vocabulary_is_answered_right(with_words):
    for tokenizer in with_words:
        texts = [i for i in range(len(tokenizer)) if i not in tokenizer.markers]
        rng = np.random.default_rng(0)
        before, after = rng.choice(texts, 4000), rng.choice(texts, 4000)
        mask = PairMask(tokenizer)
        answers = mask.valid(before, after)
        assert answers.tolist() == [stays(tokenizer, int(a), int(b)) for a, b in zip(before, after)]
        assert mask.counts[1] < mask.counts[0]  # some were answered by the rule alone
        assert not answers.all()


def test_the_word_rule_says_nothing_where_there_is_none():
    for tokenizer in (byte_level([(b"a", b"b")]), byte_fallback(["a", "b"], [])):
        cuts = WordCuts(ByteTokenizer(tokenizer))
        assert not cuts.cut(np.arange(50), np.arange(50)).any()


def test_a_rule_that_knows_words_gives_no_wrong_answers():
    """It cuts by a word instead of by kinds of characters, so what holds for one pair of a shape fails for another."""
    merges = [
        (b"c", b"a"),
        (b"ca", b"t"),
        (b"d", b"o"),
        (b"do", b"g"),
        (b"cat", b"d"),
        (b"catd", b"o"),
        (b"do", b"cat"),
    ]
    tokenizer = ByteTokenizer(byte_level(merges, pattern="dog"))
    before, after = ids_of(tokenizer, b"cat"), ids_of(tokenizer, b"dog")
    assert not WordCuts(tokenizer).cut(np.array(before), np.array(after)).any()
    mask = PairMask(tokenizer)
    for a, b in ((b"cat", b"dog"), (b"do", b"cat"), (b"cat", b"d"), (b"cat", b"do")):
        before, after = ids_of(tokenizer, a, b)
        assert mask.valid(np.array([before]), np.array([after])).tolist() == [stays(tokenizer, before, after)]


def test_shapes_by_hand():
    assert _shape("hello") == "l" and _shape(" Hello") == " ul" and _shape("  ") == " +"
    assert _shape("123") == "nnn" and _shape("((") == "p+" and _shape("\r\n\n") == "Rr+"
    assert _shape("\u4f60\u597d") == "k" and _shape("\u00e9\u00e9") == "L~"
    assert _shape("\x1f") != _shape("\t")
