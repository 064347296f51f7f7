"""Laws of the targets: by hand, against the sparse targets of one tokenizer, and as a loss."""

import numpy as np
import pytest
from align_world import byte_level, ids_of, pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logit_cache import random_dists

from distill.align import Aligner
from distill.align_keep import KeepCounts
from distill.align_spans import ALIGNED, CONTRADICTED, COVERED, INNER, INSIDE, UNCOVERED
from distill.align_targets import PaddedTargets, pad
from distill.cache_codec import prune
from distill.errors import DataError
from distill.logit_cache import to_sparse_targets
from distill.records import CaptureSpec, TokenDists


def dists_of(rows: list[dict[int, float]], sampled: list[int]) -> TokenDists:
    """Rows of token -> probability; what is missing to 1 is the tail."""
    ordered = [sorted(row.items(), key=lambda pair: -pair[1]) for row in rows]
    zeros = np.zeros(len(rows), np.float32)
    return TokenDists(
        np.cumsum([0, *map(len, rows)]),
        np.array([t for row in ordered for t, _ in row], np.int32),
        np.log([p for row in ordered for _, p in row]).astype(np.float32),
        np.array([max(1 - sum(row.values()), 0) for row in rows], np.float32),
        zeros,
        np.array(sampled, np.int32),
    )


def learn(aligner, alignment):
    """Counts and learns; the counts of keep."""
    counts = aligner.count(alignment)
    aligner.learn(counts)
    return counts.keep


CAPTURE = CaptureSpec(k_max=20, tail_bound=1e-3)


def one_hot(ids):
    return [{token: 1.0} for token in ids]


def outcomes(targets, aligner, n) -> dict[bytes, float]:
    own = slice(targets.offsets_N1[n], targets.offsets_N1[n + 1])
    names = pieces_of(aligner.student, targets.roots_E[own])
    return dict(zip(names, np.exp(targets.logq_E[own].astype(np.float64)).tolist()))


NUMERALS = [(b"1", b"2"), (b"12", b"3"), (b"12", b"4"), (b"4", b"5")]


def test_two_numbers_teach_their_digits():
    """123 at 0.7 and 124 at 0.2: first 1, then 2, then 3 against 4 as 7 to 2."""
    aligner = Aligner(byte_level(NUMERALS), byte_level([]))
    n123, n124, n12, n45 = ids_of(aligner.teacher, b"123", b"124", b"12", b"45")
    ids = [n123]
    targets = aligner.targets(
        aligner.align([ids]), [dists_of([{n123: 0.7, n124: 0.2, n12: 0.04, n45: 0.05}], ids)], CAPTURE
    )
    assert targets.kind_N.tolist() == [ALIGNED, INNER, INNER]
    # the less likely half, 45 and 12, stands for the tail: 12 repeats the digit of 123, 45 brings a new one
    tail = {b"1": 0.01 * 4 / 9, b"4": 0.01 * 5 / 9}
    assert outcomes(targets, aligner, 0) == pytest.approx({b"1": 0.94 + tail[b"1"], b"4": 0.05}, abs=1e-6)
    assert targets.tail_N == pytest.approx([tail[b"4"], 0, 0], abs=1e-6)
    assert outcomes(targets, aligner, 1) == pytest.approx({b"2": 1.0}, abs=1e-6)
    assert outcomes(targets, aligner, 2) == pytest.approx({b"3": 7 / 9, b"4": 2 / 9}, abs=1e-6)


def test_a_student_with_the_same_numbers_gets_them_whole():
    aligner = Aligner(byte_level(NUMERALS), byte_level(NUMERALS, think=False))
    n123, n124 = ids_of(aligner.teacher, b"123", b"124")
    targets = aligner.targets(aligner.align([[n123]]), [dists_of([{n123: 0.7, n124: 0.2}], [n123])], CAPTURE)
    assert outcomes(targets, aligner, 0) == pytest.approx({b"123": 0.7, b"124": 0.2}, abs=1e-6)
    assert targets.tail_N == pytest.approx([0.1], abs=1e-6)


def test_a_bucket_holds_what_the_student_writes_for_it():
    teacher = byte_level([(b"i", b"n"), (b"in", b"g")])
    student = byte_level([(b"i", b"n"), (b"in", b"g"), (b"l", b"y"), (b"ing", b"ly")])
    aligner = Aligner(teacher, student)
    ing, ell, why, x = ids_of(aligner.teacher, b"ing", b"l", b"y", b"x")
    ids = [ing, ell, why]
    rows = [{ing: 0.6, x: 0.4}, {ell: 1.0}, {why: 1.0}]
    targets = aligner.targets(aligner.align([ids]), [dists_of(rows, ids)], CAPTURE)
    assert pieces_of(aligner.student, targets.label_N) == [b"ingly"]
    padded = pad(targets, aligner.tables)
    groups = {}
    for index, group in zip(padded.ids_NK[0], padded.group_NK[0]):
        groups.setdefault(int(group), set()).add(aligner.student.bytes_V[index])
    assert groups == {0: {b"ing", b"ingly"}, 1: {b"x"}}
    assert np.exp(padded.logq_NG[0]) == pytest.approx([0.6, 0.4], abs=1e-6)
    assert padded.label_group_N.tolist() == [0]


def test_a_boundary_rules_out_what_would_have_merged_across_it():
    teacher = byte_level([])
    student = byte_level([(b"h", b"e")])
    aligner = Aligner(teacher, student)
    h, e, a = ids_of(aligner.teacher, b"h", b"e", b"a")
    ids = [h, a]
    targets = aligner.targets(aligner.align([ids]), [dists_of([{h: 1.0}, {e: 0.6, a: 0.3}], ids)], CAPTURE)
    assert outcomes(targets, aligner, 1) == pytest.approx({b"a": 0.75}, abs=1e-6)  # 0.3 against a tail of 0.1
    assert targets.tail_N[1] == pytest.approx(0.25, abs=1e-6)
    aligner.pairs = None
    unmasked = aligner.targets(aligner.align([ids]), [dists_of([{h: 1.0}, {e: 0.6, a: 0.3}], ids)], CAPTURE)
    assert outcomes(unmasked, aligner, 1) == pytest.approx({b"e": 0.6, b"a": 0.3}, abs=1e-6)


def test_keep_weighs_a_candidate_by_how_often_the_text_agrees():
    teacher = byte_level([(b"b", b"c")])
    student = byte_level([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")])
    aligner = Aligner(teacher, student)
    a, x, bc = ids_of(aligner.teacher, b"a", b"x", b"bc")
    seen = [[x, a, x], [x, a, x], [x, a, x], [a, bc]]
    counts = learn(aligner, aligner.align(seen))
    at = aligner.tables.offsets_T1[[a, x]]
    # "abc" is one student token; its root is "a", so the text agrees even there
    assert counts.seen_P[at].tolist() == [4, 6] and counts.agreed_P[at].tolist() == [4, 6]
    assert (aligner.keep_P == 1).all()
    keep = np.ones(len(aligner.tables.pieces_P))
    keep[at] = 0.5, 1.0
    aligner.keep_P = keep
    targets = aligner.targets(aligner.align([[x]]), [dists_of([{a: 0.6, x: 0.3}], [x])], CAPTURE)
    assert outcomes(targets, aligner, 0) == pytest.approx({b"a": 3 / 7, b"x": 3 / 7}, abs=1e-6)
    assert targets.tail_N == pytest.approx([1 / 7], abs=1e-6)


def test_keep_weighs_inside_a_token_too():
    aligner = Aligner(byte_level(NUMERALS), byte_level([(b"3", b"x")]))
    n123, n124, x = ids_of(aligner.teacher, b"123", b"124", b"x")
    learn(aligner, aligner.align([[n123, n124], [n123, x]]))
    # "3x" is no string of the teacher's: it stands for "3", so nothing disagrees
    assert (aligner.keep_P == 1).all()
    aligner.keep_P = np.ones(len(aligner.tables.pieces_P))
    aligner.keep_P[aligner.tables.offsets_T1[n123] + 2] = 0.5
    targets = aligner.targets(aligner.align([[n123]]), [dists_of([{n123: 0.7, n124: 0.2}], [n123])], CAPTURE)
    assert outcomes(targets, aligner, 2) == pytest.approx({b"3": 0.35 / 0.55, b"4": 0.2 / 0.55}, abs=1e-6)


def test_inside_a_token_the_text_may_disagree():
    aligner = Aligner(byte_level([*NUMERALS, (b"3", b"x")]), byte_level([(b"3", b"x")]))
    n123, x = ids_of(aligner.teacher, b"123", b"x")
    counts = learn(aligner, aligner.align([[n123, x], [n123]]))
    at = aligner.tables.offsets_T1[n123] + np.arange(3)
    assert counts.seen_P[at].tolist() == [2, 2, 2] and counts.agreed_P[at].tolist() == [2, 2, 1]


def test_keep_is_counted_where_the_text_disagrees():
    teacher, student = byte_level([(b"a", b"b")]), byte_level([(b"b", b"c"), (b"a", b"b"), (b"c", b"c")])
    aligner = Aligner(teacher, student)
    b, c, x = ids_of(aligner.teacher, b"b", b"c", b"x")
    counts = learn(aligner, aligner.align([[b, c], [b, x], [c, c], [c, x]]))
    at = aligner.tables.offsets_T1[[b, c]]
    assert counts.seen_P[at].tolist() == [2, 2]  # the c of "bc" and the second one of "cc" begin no student token
    assert counts.agreed_P[at].tolist() == [2, 2]
    other = Aligner(byte_level([(b"b", b"c"), (b"c", b"c")]), student)
    b, c, x = ids_of(other.teacher, b"b", b"c", b"x")
    counts = learn(other, other.align([[b, c], [b, x], [c, c], [c, x]]))
    # now "bc" and "cc" are shared: a text "bc" contradicts the teacher's "b"
    assert counts.agreed_P[other.tables.offsets_T1[[b, c]]].tolist() == [1, 1]
    assert 0.4 < other.keep_P[other.tables.offsets_T1[b]] < 0.9 < 1 and (other.keep_P > 0).all()


def test_a_tail_that_looks_like_the_support_belongs_to_its_outcomes():
    """Numbers of three digits, all alike, of which a few are stored: nothing is left for other tokens."""
    numerals = [bytes([a, b]) for a in b"123" for b in b"012"]
    aligner = Aligner(byte_level([(n[:1], n[1:]) for n in numerals]), byte_level([]))
    ids = ids_of(aligner.teacher, *numerals)
    stored = dict(zip([ids[0], ids[3], ids[6], ids[1], ids[4], ids[7]], [0.112, 0.112, 0.112, 0.11, 0.11, 0.11]))
    targets = aligner.targets(aligner.align([[ids[0]]]), [dists_of([stored], [ids[0]])], CaptureSpec(6, 1e-3))
    assert outcomes(targets, aligner, 0) == pytest.approx({b"1": 1 / 3, b"2": 1 / 3, b"3": 1 / 3}, abs=1e-6)
    assert targets.tail_N[0] == 0


def captured(law: dict[int, float], drawn: int, spec: CaptureSpec) -> TokenDists:
    """One position as a cache gives it back: the support, then without what is lighter than min_mass unless drawn."""
    likely = sorted(law, key=law.get, reverse=True)
    size = next(n for n in range(1, len(likely) + 1) if n == spec.k_max or tail_of(law, likely[:n]) <= spec.tail_bound)
    kept = likely[:size] if drawn in likely[:size] else [*likely[: min(size, spec.k_max - 1)], drawn]
    return prune(dists_of([{token: law[token] for token in kept}], [drawn]), spec.min_mass)


def tail_of(law: dict[int, float], kept: list[int]) -> float:
    return 1 - sum(law[token] for token in kept)


STEPS = [0.3, 0.06, 0.04, 0.019, 0.018, 0.03, 0.017, 0.016, 0.25, 0.1, 0.05, 0.022, 0.021, 0.02, 0.0195, 0.0175]
# Many entries that a cache with a bound of 0.08 leaves out of a support that holds them: each weighs less than 0.01.
LIGHT = [0.4, 0.1765, *np.linspace(0.0094, 0.0096, 6), 0.3, *np.linspace(0.0094, 0.0096, 7)]


@pytest.mark.parametrize("masses", [STEPS, LIGHT], ids=["steps", "light"])
@pytest.mark.parametrize("tail_bound", [0.0, 0.08, 0.16])
@pytest.mark.parametrize("k", [1, 2, 4, 7, 16])
def test_inside_a_token_the_support_and_the_draws_from_the_tail_make_up_the_whole_law(k, tail_bound, masses):
    """The mean target over the teacher's draws is the whole conditional law, whatever part of it is stored: a token
    beyond the support, and one that a cache holds for having been drawn alone, count as drawn from the tail."""
    numerals = [bytes([a, b]) for a in b"12" for b in b"01234567"][: len(masses)]
    aligner = Aligner(byte_level([(n[:1], n[1:]) for n in numerals]), byte_level([]))
    ids = ids_of(aligner.teacher, *numerals)
    law = dict(zip(ids, masses))
    assert sum(masses) == pytest.approx(1)
    own, mean = sum(masses[:8]), {}
    for drawn in ids[:8]:
        stored = captured(law, drawn, CaptureSpec(k, tail_bound))
        targets = aligner.targets(aligner.align([[drawn]]), [stored], CaptureSpec(k, tail_bound))
        assert targets.tail_N[1] == 0
        for digit, q in outcomes(targets, aligner, 1).items():
            mean[digit] = mean.get(digit, 0) + law[drawn] / own * q
    expected = {bytes([d]): law[t] / own for d, t in zip(b"01234567", ids[:8])}
    assert mean == pytest.approx(expected, abs=1e-6)


def test_the_end_of_a_trace_teaches_the_students_end_with_the_teachers_probability():
    aligner = Aligner(byte_level([]), byte_level([], think=False, end="<eot>"))
    a, end = ids_of(aligner.teacher, b"a", b"<|end|>")
    ids = [a, end]
    targets = aligner.targets(aligner.align([ids]), [dists_of([{a: 0.8, end: 0.15}, {end: 0.9, a: 0.1}], ids)], CAPTURE)
    (stop,) = ids_of(aligner.student, b"<eot>")
    assert targets.label_N[-1] == stop and targets.kind_N.tolist() == [ALIGNED, ALIGNED]
    assert outcomes(targets, aligner, 1) == pytest.approx({b"<eot>": 0.9, b"a": 0.1}, abs=1e-6)
    assert outcomes(targets, aligner, 0) == pytest.approx({b"a": 0.8, b"<eot>": 0.15}, abs=1e-6)


def test_positions_without_a_distribution_say_nothing_but_their_label():
    teacher = byte_level([(b"b", b"c"), (b"c", b"d")])
    student = byte_level([(b"b", b"c")])
    aligner = Aligner(teacher, student)
    b, cd = ids_of(aligner.teacher, b"b", b"cd")
    targets = aligner.targets(aligner.align([[b, cd]]), [dists_of(one_hot([b, cd]), [b, cd])], CAPTURE)
    assert pieces_of(aligner.student, targets.label_N) == [b"bc", b"d"]
    assert targets.kind_N.tolist() == [CONTRADICTED, INSIDE]
    assert targets.offsets_N1.tolist() == [0, 0, 0] and targets.tail_N.tolist() == [1, 1]
    assert pad(targets, aligner.tables).label_group_N.tolist() == [-1, -1]


def test_the_tail_behind_a_single_candidate_is_the_rest_however_that_one_is_weighed():
    """Most positions of a sure teacher; no less likely half of the support says what such a tail is like."""
    aligner = Aligner(byte_level(NUMERALS), byte_level([]))
    ids = ids_of(aligner.teacher, b"a", b"12")
    alignment, dists = aligner.align([ids]), dists_of([{token: 0.999} for token in ids], ids)
    for keep in (1.0, 0.8):
        aligner.keep_P = np.full(len(aligner.tables.pieces_P), keep)
        rest = 0.001 / (0.999 * keep + 0.001)
        targets = aligner.targets(alignment, [dists], CAPTURE)
        assert targets.tail_N == pytest.approx([rest, rest, 0], abs=1e-7)
        assert outcomes(targets, aligner, 0) == pytest.approx({b"a": 1 - rest}, abs=1e-7)
        read, _, _ = aligner.read_targets(alignment, [dists])
        assert read.tail_N == pytest.approx([0.001 + 0.999 * (1 - keep)] * 2 + [1 - keep], abs=1e-7)
        assert outcomes(read, aligner, 0) == pytest.approx({b"a": 0.999 * keep}, abs=1e-7)


def test_a_piece_that_was_seldom_seen_is_kept_as_often_as_all_are():
    counts = KeepCounts(np.array([10, 0, 90]), np.array([5, 0, 90]))
    all_ = 96 / 101
    assert counts.shares() == pytest.approx([(5 + 4 * all_) / 14, all_, (90 + 4 * all_) / 94])
    assert KeepCounts(np.array([3, 0]), np.array([3, 0])).shares().tolist() == [1.0, 1.0]


def test_a_position_whose_candidates_are_all_ruled_out_is_counted_apart():
    """The mask judges by the piece of the candidate alone; the text shows a longer token of its bucket."""
    teacher = byte_level([])
    student = byte_level([(b"b", b"c"), (b"a", b"b")])  # "abc" is a, bc, but "ab" alone is one token
    aligner = Aligner(teacher, student)
    ids = ids_of(aligner.teacher, b"a", b"b", b"c")
    targets = aligner.targets(aligner.align([ids]), [dists_of(one_hot(ids), ids)], CAPTURE)
    assert pieces_of(aligner.student, targets.label_N) == [b"a", b"bc"]
    assert targets.kind_N.tolist() == [ALIGNED, UNCOVERED] and targets.tail_N.tolist() == [0, 1]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 40))
def test_one_tokenizer_gives_the_plain_sparse_targets_bit_for_bit(seed, tokens):
    tokenizer = byte_level([(b"a", b"b"), (b"c", b"d")])
    aligner = Aligner(tokenizer, tokenizer)
    dists = random_dists(seed, tokens=tokens, vocab=len(aligner.teacher))
    learn(aligner, aligner.align([dists.sampled_T]))
    padded = pad(aligner.targets(aligner.align([dists.sampled_T]), [dists], CAPTURE), aligner.tables)
    ids_NK, logprobs_NK, tail_N = to_sparse_targets(dists)
    np.testing.assert_array_equal(padded.ids_NK, ids_NK)
    np.testing.assert_array_equal(padded.logq_NG.view(np.int32), logprobs_NK.view(np.int32))
    np.testing.assert_array_equal(padded.tail_N.view(np.int32), tail_N.view(np.int32))
    np.testing.assert_array_equal(padded.label_N, dists.sampled_T)
    assert (padded.group_NK == np.where(logprobs_NK > -np.inf, np.arange(ids_NK.shape[1]), -1)).all()
    assert set(padded.kind_N.tolist()) == {ALIGNED}


def loss(padded: PaddedTargets, logits_NV: np.ndarray) -> np.ndarray:
    """The definition, in float64 loops: KL of the outcomes and the rest, and which member of its bucket the label
    is."""
    p_NV = np.exp(logits_NV - np.logaddexp.reduce(logits_NV, axis=1)[:, None])
    found = []
    for n, p in enumerate(p_NV):
        masses = [p[padded.ids_NK[n][padded.group_NK[n] == g]].sum() for g in range(padded.group_NK[n].max() + 1)]
        q = np.exp(padded.logq_NG[n][: len(masses)].astype(np.float64))
        rest, tail = 1 - sum(masses), float(padded.tail_N[n])
        value = sum(q * np.log(q / masses)) + (tail * np.log(tail / rest) if tail > 0 else 0)
        group = padded.label_group_N[n]
        value -= np.log(p[padded.label_N[n]] / (masses[group] if group >= 0 else rest))
        found.append(value)
    return np.array(found)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_masses_sum_to_one_the_label_is_covered_and_the_loss_is_what_it_says(seed):
    rng = np.random.default_rng(seed)
    teacher = byte_level([(b"a", b"b"), (b"ab", b"c"), (b"c", b"a")])
    student = byte_level([(b"b", b"c"), (b"a", b"b"), (b"ab", b"ab"), (b"c", b"c")])
    aligner = Aligner(teacher, student)
    names = ids_of(aligner.teacher, b"a", b"b", b"c", b"ab", b"abc", b"ca", b"<|end|>")
    ids = rng.choice(names[:-1], 20).tolist()
    rows = [dict(zip(names, rng.dirichlet(np.ones(len(names) + 1))[:-1])) for _ in ids]
    alignment = aligner.align([ids])
    learn(aligner, alignment)
    targets = aligner.targets(alignment, [dists_of(rows, ids)], CAPTURE)
    padded = pad(targets, aligner.tables)
    mass_N = np.exp(padded.logq_NG.astype(np.float64)).sum(1) + padded.tail_N
    np.testing.assert_allclose(mass_N, 1, atol=1e-6)
    assert ((padded.label_group_N >= 0) == (targets.kind_N <= COVERED)).all()
    logits_NV = rng.normal(size=(len(targets), len(aligner.student)))
    values_N = loss(padded, logits_NV)
    log_p = logits_NV - np.logaddexp.reduce(logits_NV, axis=1)[:, None]
    ce_N = -log_p[np.arange(len(targets)), targets.label_N]
    np.testing.assert_allclose(values_N[targets.kind_N > COVERED], ce_N[targets.kind_N > COVERED], atol=1e-9)
    single = (padded.group_NK == padded.label_group_N[:, None]).sum(1) == 1
    assert (values_N[single & (targets.kind_N <= COVERED)] >= -1e-9).all()  # a KL alone


def test_distributions_of_another_text_raise():
    aligner = Aligner(byte_level([]), byte_level([], think=False))
    with pytest.raises(DataError, match="of another text"):
        aligner.targets(aligner.align([[65, 66]]), [dists_of(one_hot([65, 67]), [65, 67])], CAPTURE)
    with pytest.raises(DataError, match="2 positions for 3"):
        aligner.targets(aligner.align([[65, 66, 67]]), [dists_of(one_hot([65, 66]), [65, 66])], CAPTURE)


def test_nothing_in_nothing_out():
    aligner = Aligner(byte_level([]), byte_level([], think=False))
    targets = aligner.targets(aligner.align([]), [], CAPTURE)
    padded = pad(targets, aligner.tables)
    assert len(targets) == 0 and padded.ids_NK.shape == (0, 0) and padded.logq_NG.shape == (0, 0)
