"""Laws of the statistics: hand-computed values, other published tests as special cases, coverage by simulation."""

import itertools
import math
from math import comb

import numpy as np
import pytest

from distill.errors import DataError
from distill.evals import stats

NAN = float("nan")


def draw(rng, problems, samples, accuracies, spread=1.0, shared=0.7):
    """Correctness [P, K] of several models whose difficulties are correlated over the problems.

    A problem's accuracy is a probit-normal with the wanted mean; spread 0 makes all problems equally hard.
    """
    common_P = rng.normal(size=problems)
    out = []
    for accuracy in accuracies:
        own_P = rng.normal(size=problems)
        hard_P = math.sqrt(spread) * (math.sqrt(shared) * common_P + math.sqrt(1 - shared) * own_P)
        level = stats_normal_quantile(accuracy) * math.sqrt(1 + spread)
        out.append((rng.normal(size=(problems, samples)) < (level + hard_P)[:, None]).astype(float))
    return out


def stats_normal_quantile(p):
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


# Quantiles


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.975, 5, 2.5705818),
        (0.975, 10, 2.2281389),
        (0.95, 29, 1.6991270),
    ],
)
def test_t_quantile_equals_the_printed_tables(p, df, value):
    assert stats.t_quantile(p, df) == pytest.approx(value, abs=1e-6)


def test_t_quantile_tends_to_the_normal_one():
    assert stats.t_quantile(0.975, 100_000) == pytest.approx(stats_normal_quantile(0.975), abs=5e-5)


# One model


def test_pass_at_1_is_the_mean_of_problem_means_whatever_the_sample_counts():
    # Means 1/2, 1 and 0: (0.5 + 1 + 0) / 3; pooling the samples would give 3/5.
    correct_PK = np.array([[1, 0], [1, 1], [0, NAN]])
    estimate = stats.pass_at_1(correct_PK)
    assert estimate.value == pytest.approx(0.5)
    assert (estimate.n_problems, estimate.n_samples) == (3, 5)


def test_a_grader_error_is_not_a_wrong_answer():
    with_error = stats.pass_at_1(np.array([[1, NAN], [1, 1], [0, 1], [NAN, NAN]]))
    without = stats.pass_at_1(np.array([[1, 1], [1, 1], [0, 1]]))
    assert with_error.value == without.value == pytest.approx(5 / 6)
    assert with_error.n_problems == 3 and with_error.n_samples == 5


def test_interval_for_one_sample_a_problem_is_wilsons_with_a_t_quantile():
    correct_PK = np.array([[1.0]] * 7 + [[0.0]] * 3)
    t, n, p = stats.t_quantile(0.975, 9), 10, 0.7
    centre = (p + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(p * (1 - p) / n + t**2 / (4 * n * n))
    estimate = stats.pass_at_1(correct_PK)
    assert (estimate.low, estimate.high) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_interval_is_mirrored_when_right_and_wrong_are_swapped():
    correct_PK = np.random.default_rng(1).random((25, 4)) < 0.9
    a, b = stats.pass_at_1(correct_PK), stats.pass_at_1(~correct_PK)
    assert (a.low, a.high) == (pytest.approx(1 - b.high), pytest.approx(1 - b.low))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_interval_has_width_when_every_sample_agrees(value):
    estimate = stats.pass_at_1(np.full((50, 8), value))
    assert estimate.value == value
    assert 0.05 < estimate.high - estimate.low < 0.10  # about 4/50 for 50 problems, not 4/400 for 400 samples


def test_more_samples_of_the_same_all_or_nothing_problems_teach_nothing():
    once_PK = np.array([[1.0]] * 20 + [[0.0]] * 10)
    one, many = stats.pass_at_1(once_PK), stats.pass_at_1(np.repeat(once_PK, 64, axis=1))
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=1e-6)


def test_naive_interval_is_too_narrow_where_the_clustered_one_covers():
    rng, truth, inside, naive_inside = np.random.default_rng(2), 0.5, 0, 0
    for _ in range(600):
        (correct_PK,) = draw(rng, 30, 64, [truth], spread=3.0)
        estimate = stats.pass_at_1(correct_PK)
        inside += estimate.low <= truth <= estimate.high
        naive = 1.96 * math.sqrt(estimate.value * (1 - estimate.value) / correct_PK.size)
        naive_inside += abs(estimate.value - truth) <= naive
    assert inside / 600 > 0.91
    assert naive_inside / 600 < 0.5


@pytest.mark.parametrize(("accuracy", "spread"), [(0.02, 1.0), (0.1, 0.3), (0.5, 3.0), (0.9, 1.0), (0.98, 0.3)])
@pytest.mark.parametrize(("problems", "samples"), [(15, 4), (100, 1), (100, 4)])
def test_coverage_of_one_accuracy(accuracy, spread, problems, samples):
    rng, inside = np.random.default_rng(3), 0
    for _ in range(600):
        (correct_PK,) = draw(rng, problems, samples, [accuracy], spread)
        estimate = stats.pass_at_1(correct_PK)
        inside += estimate.low <= accuracy <= estimate.high
    assert inside / 600 > 0.90  # 0.95 less more than four standard errors of 600 draws


def test_wider_confidence_gives_a_wider_interval():
    correct_PK = np.random.default_rng(4).random((40, 4)) < 0.6
    narrow, wide = stats.pass_at_1(correct_PK, 0.8), stats.pass_at_1(correct_PK, 0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(("right", "n", "k"), [(0, 5, 2), (1, 5, 2), (3, 5, 2), (4, 5, 2), (5, 5, 5), (2, 8, 4)])
def test_pass_at_k_equals_counting_every_subset(right, n, k):
    row = [1] * right + [0] * (n - right)
    subsets = list(itertools.combinations(row, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert expected == pytest.approx(1 - comb(n - right, k) / comb(n, k))
    assert stats.pass_at_k(np.array([row, row]), k).value == pytest.approx(expected)


def test_pass_at_1_of_the_unbiased_estimator_is_the_mean():
    correct_PK = np.random.default_rng(5).random((20, 6)) < 0.4
    assert stats.pass_at_k(correct_PK, 1).value == pytest.approx(stats.pass_at_1(correct_PK).value)


def test_pass_at_k_refuses_fewer_than_k_samples():
    with pytest.raises(DataError, match="pass@4 needs at least 4"):
        stats.pass_at_k(np.array([[1, 0, 1, NAN], [1, 0, 1, 0]]), 4)
    with pytest.raises(DataError):
        stats.pass_at_k(np.ones((2, 2)), 0)


def test_maj_at_k_splits_ties_and_lets_unread_answers_abstain():
    answers = [
        ["7", "7", "8"],  # majority right: 1
        ["7", "8", None],  # a tie of a right and a wrong answer: 1/2
        [None, None, "8"],  # one vote, wrong: 0
        [None, None, None],  # no vote: 0
    ]
    correct_PK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert stats.maj_at_k(answers, correct_PK).value == pytest.approx((1 + 0.5 + 0 + 0) / 4)


# Two models


def test_sign_flip_p_value_by_hand():
    # Differences 1, 1/2, -1/2: |sum| = 1. Of 8 sign choices the sums are +-2, +-1 (twice each), 0 (twice): 6 of 8.
    p, method = stats.sign_flip_p_value(np.array([1, 0.5, -0.5]), 2)
    assert (p, method) == (6 / 8, "exact")


def test_exact_p_value_equals_full_enumeration():
    rng = np.random.default_rng(6)
    a_PK, b_PK = (rng.random((11, 3)) < share for share in (0.7, 0.4))
    difference_P = a_PK.mean(1) - b_PK.mean(1)
    sums = [abs(np.dot(signs, difference_P)) for signs in itertools.product((-1, 1), repeat=11)]
    expected = np.mean([s >= abs(difference_P.sum()) - 1e-12 for s in sums])
    result = stats.paired_difference(a_PK, b_PK)
    assert result.method == "exact" and result.p_value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(8, 2), (3, 3), (0, 6), (1, 0)])
def test_p_value_for_one_sample_is_mcnemars_exact_test(only_a, only_b):
    a = [1] * only_a + [0] * only_b + [1] * 5 + [0] * 4
    b = [0] * only_a + [1] * only_b + [1] * 5 + [0] * 4
    n, larger = only_a + only_b, max(only_a, only_b)
    mcnemar = min(1.0, 2 * sum(comb(n, i) for i in range(larger, n + 1)) / 2**n)
    result = stats.paired_difference(np.array(a)[:, None], np.array(b)[:, None])
    assert result.p_value == pytest.approx(mcnemar)


def test_monte_carlo_agrees_with_exact_never_returns_zero_and_is_seeded(monkeypatch):
    rng = np.random.default_rng(7)
    a_PK, b_PK = draw(rng, 60, 4, [0.7, 0.6])
    exact = stats.paired_difference(a_PK, b_PK)
    monkeypatch.setattr(stats, "_MAX_EXACT_WORK", 0)
    drawn = stats.paired_difference(a_PK, b_PK, permutations=20_000, seed=1)
    assert (exact.method, drawn.method) == ("exact", "monte carlo")
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * math.sqrt(exact.p_value / 20_000) + 1e-4)
    assert drawn == stats.paired_difference(a_PK, b_PK, permutations=20_000, seed=1)
    assert stats.paired_difference(np.ones((80, 2)), np.zeros((80, 2)), permutations=999).p_value == 1 / 1000


def test_p_value_is_uniform_when_the_models_are_the_same():
    rng = np.random.default_rng(8)
    p_values = np.array([stats.paired_difference(*draw(rng, 40, 4, [0.6, 0.6])).p_value for _ in range(400)])
    for level in (0.05, 0.2, 0.5, 0.8):
        # At most the level (a valid test), and not much below it (not a blind one): four standard errors.
        assert abs((p_values <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 400) + 0.01


def test_difference_changes_sign_with_the_order_and_keeps_its_p_value():
    a_PK, b_PK = draw(np.random.default_rng(9), 30, 4, [0.8, 0.5])
    ab, ba = stats.paired_difference(a_PK, b_PK), stats.paired_difference(b_PK, a_PK)
    assert ab.difference == pytest.approx(-ba.difference) and ab.p_value == pytest.approx(ba.p_value)
    assert (ab.low, ab.high) == (pytest.approx(-ba.high), pytest.approx(-ba.low))


def test_interval_of_a_difference_for_one_sample_is_bonett_and_prices():
    # 12 of 40 problems only a solves, 5 only b: centre (12 - 5) / 42, spread of 13 and 6 of 42.
    a_PK = np.array([1] * 12 + [0] * 5 + [1] * 23)[:, None]
    b_PK = np.array([0] * 12 + [1] * 5 + [1] * 23)[:, None]
    p12, p21, t = 13 / 42, 6 / 42, stats.t_quantile(0.975, 39)
    half = t * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 42)
    result = stats.paired_difference(a_PK, b_PK)
    assert (result.low, result.high) == (pytest.approx(p12 - p21 - half), pytest.approx(p12 - p21 + half))


def test_the_same_samples_differ_by_nothing_with_p_one():
    (a_PK,) = draw(np.random.default_rng(10), 50, 4, [0.7])
    result = stats.paired_difference(a_PK, a_PK)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.low < 0 < result.high


def test_pairing_sees_what_two_separate_intervals_do_not():
    # b loses one sample on one in five problems: unpaired intervals overlap widely, paired p is tiny.
    rng = np.random.default_rng(11)
    a_PK = np.repeat(rng.random((100, 1)) < 0.5, 4, axis=1).astype(float)
    b_PK = a_PK.copy()
    b_PK[np.flatnonzero(a_PK[:, 0])[:20], 0] = 0
    result = stats.paired_difference(a_PK, b_PK)
    assert stats.pass_at_1(b_PK).high > stats.pass_at_1(a_PK).value
    assert result.p_value == pytest.approx(2 * 0.5**20)


@pytest.mark.parametrize("accuracies", [(0.98, 0.96, 0.05), (0.95, 0.8, 0.2), (0.6, 0.5, 0.3)])
@pytest.mark.parametrize(("problems", "samples"), [(15, 1), (40, 4), (100, 16)])
def test_coverage_of_paired_difference_and_gap(accuracies, problems, samples):
    rng, inside, defined, gap_inside = np.random.default_rng(12), 0, 0, 0
    teacher, student, base = accuracies
    for _ in range(150):
        t_PK, s_PK, b_PK = draw(rng, problems, samples, accuracies)
        difference_P = t_PK.mean(1) - s_PK.mean(1)
        low, high = stats._paired_interval(difference_P, samples, 0.95)
        inside += low <= teacher - student <= high
        gap = stats.gap_recovered(s_PK, t_PK, b_PK)
        if gap.value is not None:
            defined += 1
            gap_inside += gap.low <= (student - base) / (teacher - base) <= gap.high
    assert inside / 150 > 0.88
    assert gap_inside / max(defined, 1) > 0.88
    assert defined > 15  # where the gap is real it is found, so the line above is about something


# Gap recovered


def test_gap_recovered_by_hand():
    teacher_PK = np.ones((40, 1))
    base_PK = np.array([[1.0]] * 10 + [[0.0]] * 30)  # 0.25
    student_PK = np.array([[1.0]] * 34 + [[0.0]] * 6)  # 0.85
    gap = stats.gap_recovered(student_PK, teacher_PK, base_PK)
    assert gap.value == pytest.approx((0.85 - 0.25) / 0.75)
    assert gap.low < gap.value < gap.high


def test_a_student_equal_to_the_teacher_recovers_one_and_equal_to_the_base_zero():
    teacher_PK, base_PK = draw(np.random.default_rng(13), 80, 4, [0.9, 0.2])
    one, none = stats.gap_recovered(teacher_PK, teacher_PK, base_PK), stats.gap_recovered(base_PK, teacher_PK, base_PK)
    assert one.value == pytest.approx(1.0) and one.low < 1 < one.high
    assert none.value == pytest.approx(0.0) and none.low < 0 < none.high


def test_gap_is_undefined_exactly_when_the_lead_may_be_zero():
    rng, seen = np.random.default_rng(14), set()
    for _ in range(200):
        t_PK, s_PK, b_PK = draw(rng, 30, 2, [0.6, 0.5, 0.45])
        lead = stats.paired_difference(t_PK, b_PK)
        gap = stats.gap_recovered(s_PK, t_PK, b_PK)
        assert (gap.value is None) == (lead.low <= 0)
        assert (gap.value is None) == bool(gap.reason)
        seen.add(gap.value is None)
    assert seen == {True, False}


def test_gap_says_that_a_teacher_worse_than_the_base_has_no_lead():
    gap = stats.gap_recovered(np.ones((30, 1)), np.zeros((30, 1)), np.ones((30, 1)))
    assert gap.value is None and "negative" in gap.reason


def test_fieller_interval_agrees_with_the_bootstrap_for_many_problems():
    t_PK, s_PK, b_PK = draw(np.random.default_rng(15), 400, 4, [0.95, 0.8, 0.2])
    gap = stats.gap_recovered(s_PK, t_PK, b_PK)
    low, high = stats.bootstrap_gap(s_PK, t_PK, b_PK, draws=4000)
    width = gap.high - gap.low
    assert gap.low == pytest.approx(low, abs=0.15 * width) and gap.high == pytest.approx(high, abs=0.15 * width)


# Ratios and multiplicity


def test_ratio_of_sums_weighs_tokens_and_clusters_by_trace():
    # 3 nats over 10 tokens and 9 over 30: 0.3 exactly in each, so no spread at all.
    same = stats.ratio_of_sums(np.array([3.0, 9.0]), np.array([10, 30]))
    assert (same.value, same.low, same.high) == (pytest.approx(0.3),) * 3
    # 0 over 10 and 4 over 10: value 0.2, residuals -2 and 2, error sqrt(2 / 1 * 8) / 20 = 0.2.
    spread = stats.ratio_of_sums(np.array([0.0, 4.0]), np.array([10, 10]))
    assert spread.high - spread.value == pytest.approx(12.7062047 * 0.2)


def test_coverage_of_a_ratio_over_unequal_clusters():
    # Values depend on their cluster and on its size; the mean over items is E[size value] / E[size].
    rng, inside, naive_inside = np.random.default_rng(16), 0, 0
    for _ in range(500):
        size_G = rng.integers(5, 60, size=40)
        items = [rng.normal(0.5 + 0.01 * n + rng.normal(scale=0.4), 0.3, size=n) for n in size_G]
        estimate = stats.ratio_of_sums(np.array([x.sum() for x in items]), size_G)
        truth = 0.5 + 0.01 * np.square(np.arange(5, 60)).mean() / np.arange(5, 60).mean()
        inside += estimate.low <= truth <= estimate.high
        pooled = np.concatenate(items)
        naive_inside += abs(pooled.mean() - truth) <= 1.96 * pooled.std() / math.sqrt(len(pooled))
    assert inside / 500 > 0.91 and naive_inside / 500 < 0.7


def test_ratio_of_sums_ignores_empty_clusters_and_keeps_its_bound():
    a = stats.ratio_of_sums(np.array([0.0, 4.0, 0.0]), np.array([10, 10, 0]), lowest=0.0)
    assert a.n_problems == 2 and a.low == 0.0
    assert math.isnan(stats.ratio_of_sums(np.zeros(1), np.zeros(1)).value)


def test_holm_by_hand():
    # Sorted .01 .02 .04: times 3, 2, 1 and never falling.
    assert stats.holm([0.04, 0.01, 0.02]) == [pytest.approx(0.04), pytest.approx(0.03), pytest.approx(0.04)]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


# Bad input


@pytest.mark.parametrize("bad", [np.array([[0.5]]), np.array([1.0, 0.0]), np.full((2, 2), NAN)])
def test_what_is_not_a_table_of_graded_samples_is_refused(bad):
    with pytest.raises(DataError):
        stats.pass_at_1(bad)


def test_models_over_different_problems_are_not_compared():
    with pytest.raises(DataError, match="same problems"):
        stats.paired_difference(np.ones((3, 1)), np.ones((4, 1)))
