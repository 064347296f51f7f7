"""Exactness: against a teacher whose probabilities are known, a target is the conditional law of what comes next.

The teacher is a random chain over the tokens of a random BPE. The truth at a position is found without any table: every
token that the teacher might have said there is written behind the text so far, the student's own tokenizer encodes the
whole, and the probabilities of what then stands at the position are added up.
"""

from dataclasses import dataclass

import numpy as np
from align_world import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.align import Aligner
from distill.align_spans import ALIGNED, INNER
from distill.records import CaptureSpec, TokenDists
from distill.tokens import byte_alphabet, end_id

MAX_TOKENS = 14
WHOLE = CaptureSpec(k_max=10**6, tail_bound=0.0)


def random_merges(rng, alphabet: bytes, count: int) -> list[tuple[bytes, bytes]]:
    pieces, merges = [bytes([b]) for b in alphabet], []
    for _ in range(count):
        a, b = (pieces[i] for i in rng.integers(len(pieces), size=2))
        if len(a + b) <= 4 and a + b not in pieces:
            pieces.append(a + b)
            merges.append((a, b))
    return merges


@dataclass
class Chain:
    """A teacher: p(next token | last token), over all tokens or only those that its own tokenizer would write."""

    tokenizer: object
    rng: np.random.Generator
    canonical: bool

    def __post_init__(self):
        added = self.tokenizer.get_added_vocab()
        self.end = end_id(self.tokenizer)
        alphabet, vocab = byte_alphabet(), self.tokenizer.get_vocab()
        self.texts = {i: bytes(alphabet[c] for c in text) for text, i in vocab.items() if text not in added}
        self.rows = {}

    def row(self, last: int | None) -> dict[int, float]:
        """Probability of each token that may come behind `last`."""
        if last not in self.rows:
            tokens = [t for t in self.texts if not self.canonical or self._stays(last, t)]
            mass = self.rng.dirichlet(np.full(len(tokens) + 1, 0.5)) + 1e-6
            self.rows[last] = dict(zip([*tokens, self.end], mass / mass.sum()))
        return self.rows[last]

    def _stays(self, last: int | None, token: int) -> bool:
        ids = [token] if last is None else [last, token]
        text = b"".join(self.texts[t] for t in ids).decode()
        return self.tokenizer.encode(text, add_special_tokens=False) == ids

    def sample(self) -> list[int]:
        ids = []
        while len(ids) < MAX_TOKENS and (not ids or ids[-1] != self.end):
            row = self.row(ids[-1] if ids else None)
            ids.append(int(self.rng.choice(list(row), p=list(row.values()))))
        return ids

    def dists(self, ids: list[int]) -> TokenDists:
        """Whole distributions, no tail."""
        rows = [self.row(last) for last in [None, *ids[:-1]]]
        ordered = [sorted(row.items(), key=lambda pair: -pair[1]) for row in rows]
        flat = [pair for row in ordered for pair in row]
        zeros = np.zeros(len(ids), np.float32)
        return TokenDists(
            np.cumsum([0, *map(len, ordered)]),
            np.array([t for t, _ in flat], np.int32),
            np.log([p for _, p in flat]).astype(np.float32),
            zeros,
            zeros,
            np.array(ids, np.int32),
        )


def truth(chain: Chain, student, ids: list[int], realised: list[int], teacher_index: int, n: int) -> dict[int, float]:
    """Law of the student's token n, given the teacher's tokens before `teacher_index` and the student's before n."""
    before = b"".join(chain.texts[t] for t in ids[:teacher_index])
    mass = {}
    for token, p in chain.row(ids[teacher_index - 1] if teacher_index else None).items():
        text = before + chain.texts.get(token, b"")
        found = student.encode(text.decode(), add_special_tokens=False) + [end_id(student)] * (token == chain.end)
        if found[:n] == realised[:n] and len(found) > n:
            mass[found[n]] = mass.get(found[n], 0.0) + p
    return {token: p / sum(mass.values()) for token, p in mass.items()}


def assert_exact(chain: Chain, student, positions: set[int]):
    """Every position is covered by one of these kinds, and its target is the truth to 1e-6."""
    ids = chain.sample()
    aligner = Aligner(chain.tokenizer, student)
    alignment = aligner.align([ids])
    targets = aligner.targets(alignment, [chain.dists(ids)], WHOLE)
    realised = alignment.ids_N.tolist()
    text = b"".join(chain.texts.get(t, b"") for t in ids).decode()
    assert realised == student.encode(text, add_special_tokens=False) + [end_id(student)] * (ids[-1] == chain.end)
    assert set(targets.kind_N.tolist()) <= positions
    for n in range(len(targets)):
        own = slice(targets.offsets_N1[n], targets.offsets_N1[n + 1])
        found = dict(zip(targets.roots_E[own].tolist(), np.exp(targets.logq_E[own].astype(np.float64)).tolist()))
        expected = truth(chain, student, ids, realised, int(alignment.teacher_N[n]), n)
        assert max(abs(found.get(t, 0.0) - expected.get(t, 0.0)) for t in found | expected) < 1e-6
        assert targets.tail_N[n] == 0
        assert all(aligner.tables.bucket_sizes_S[t] == 1 for t in found)  # the law of tokens, not of coarser buckets


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, merges=st.integers(0, 16))
def test_a_student_of_bytes_gets_the_teachers_law_of_the_next_byte_at_every_position(seed, merges):
    rng = np.random.default_rng(seed)
    alphabet = b"abc "
    teacher = byte_level(random_merges(rng, alphabet, merges), alphabet=alphabet)
    # the teacher may write anything, also what its own tokenizer would not
    assert_exact(Chain(teacher, rng, canonical=False), byte_level([], alphabet=alphabet), {ALIGNED, INNER})


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, merges=st.integers(2, 18), share=st.floats(0, 1))
def test_a_student_whose_merges_stop_earlier_gets_the_exact_law(seed, merges, share):
    rng = np.random.default_rng(seed)
    alphabet = b"abc "
    all_merges = random_merges(rng, alphabet, merges)
    teacher = byte_level(all_merges, alphabet=alphabet)
    student = byte_level(all_merges[: int(share * len(all_merges))], alphabet=alphabet)
    assert_exact(Chain(teacher, rng, canonical=True), student, {ALIGNED, INNER})


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_single_digits_get_the_exact_law_of_numbers_of_three(seed):
    rng = np.random.default_rng(seed)
    digits = [bytes([d]) for d in b"012"]
    numerals = [(a, b) for a in digits for b in digits] + [(a, b + c) for a in digits for b in digits for c in digits]
    words = [(b"x", b"y"), (b"xy", b"x")]
    teacher = byte_level(words + numerals, alphabet=b"012xy", pattern=r"[0-9]{1,3}|[a-z]+")
    student = byte_level(words, alphabet=b"012xy", pattern=r"[0-9]|[a-z]+")
    assert_exact(Chain(teacher, rng, canonical=True), student, {ALIGNED, INNER})


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, merges=st.tuples(st.integers(0, 16), st.integers(0, 16)))
def test_inside_a_token_of_any_pair_the_target_is_the_law_of_its_next_piece(seed, merges):
    """Two unrelated tokenizers: given the teacher's tokens before, the pieces consumed, and that the token goes on."""
    rng = np.random.default_rng(seed)
    alphabet = b"abc "
    teacher, student = (byte_level(random_merges(rng, alphabet, n), alphabet=alphabet) for n in merges)
    chain = Chain(teacher, rng, canonical=False)
    ids = chain.sample()
    aligner = Aligner(teacher, student)
    alignment = aligner.align([ids])
    targets = aligner.targets(alignment, [chain.dists(ids)], WHOLE)
    pieces = {t: student.encode(text.decode(), add_special_tokens=False) for t, text in chain.texts.items()}
    for n in np.flatnonzero(targets.kind_N == INNER):
        i, d = int(alignment.teacher_N[n]), int(alignment.depth_N[n])
        consumed = alignment.ids_N[n - d : n].tolist()
        mass = {}
        for token, p in chain.row(ids[i - 1] if i else None).items():
            if token != chain.end and pieces[token][:d] == consumed and len(pieces[token]) > d:
                root = int(aligner.tables.root_S[pieces[token][d]])
                mass[root] = mass.get(root, 0.0) + p
        own = slice(targets.offsets_N1[n], targets.offsets_N1[n + 1])
        found = dict(zip(targets.roots_E[own].tolist(), np.exp(targets.logq_E[own].astype(np.float64)).tolist()))
        assert found.keys() == mass.keys()
        assert all(abs(found[root] - mass[root] / sum(mass.values())) < 1e-6 for root in mass)
