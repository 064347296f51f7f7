"""Accuracy of sampled models with honest errors: the unit that is drawn at random is the problem, never the sample.

Legend: P problems, K samples of each, G clusters, B bootstrap draws. correct_PK is float or bool [P, K]: 1 right, 0 not
right, NaN a sample the grader failed on (left out of its problem's mean; a problem with no sample left is left out).

Choices, each made by simulation over P 10-300, K 1-16, accuracies 0.02-0.98 and difficulties from uniform to
all-or-nothing (tests/unit/evals/test_stats.py repeats a part; nominal 95 %):
- One accuracy: Wilson's interval with the effective sample size p(1-p)/se^2, se over per-problem means, and a t
  quantile with P - 1 degrees of freedom. One pseudo-problem of full variance keeps the variance from vanishing when all
  problems come out alike. Coverage seen: at least 0.89, where the plain t interval falls to 0.17. For K = 1 it is
  Wilson's interval with t for z.
- A paired difference: t interval over per-problem differences with two pseudo-problems +-K^-1/4 added (for K = 1 the
  interval of Bonett and Price 2012). Coverage seen: at least 0.92; plain t falls to 0.48.
- A gap recovered: Fieller's interval (1954) for a ratio of paired means, with the same two pseudo-problems. It is
  bounded exactly when the paired interval of teacher - base excludes 0. Coverage seen: at least 0.91; bootstrapping the
  problems falls to 0.38 at P = 15 and agrees with it at P = 200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distill.errors import DataError

_MAX_EXACT_WORK = 400_000_000  # additions of the exact permutation distribution; about a second


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. n_problems and n_samples are what it was computed from."""

    value: float
    low: float
    high: float
    n_problems: int
    n_samples: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean over problems of a - b, its interval and two-sided p-value; method is "exact" or "monte carlo"."""

    difference: float
    low: float
    high: float
    p_value: float
    method: str
    n_problems: int


@dataclass(frozen=True)
class GapRecovered:
    """(student - base) / (teacher - base) with its interval; all None, with the reason, when the gap is not there."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""


def pass_at_1(correct_PK: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean over problems of each problem's share of right samples, with the clustered interval."""
    right_P, count_P = _counts(correct_PK)
    return clustered_mean(right_P / count_P, int(count_P.sum()), confidence)


def pass_at_k(correct_PK: np.ndarray, k: int, confidence: float = 0.95) -> Estimate:
    """Chance that at least one of k samples is right: per problem 1 - prod_{i=n-c+1..n} (1 - k/i), unbiased for n >= k
    (Chen et al. 2021, eq. 1), averaged over problems, with the clustered interval.

    Errors: DataError when a problem has fewer than k graded samples: there is no unbiased estimate then.
    """
    right_P, count_P = _counts(correct_PK)
    if k < 1 or count_P.min() < k:
        raise DataError(
            f"pass@{k} needs at least {max(k, 1)} graded samples of every problem",
            value=int(count_P.min()),
            remedy="Draw more samples (eval.k) or ask for a smaller k.",
        )
    value_P = np.array(
        [1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c, n in zip(right_P, count_P, strict=True)]
    )
    return clustered_mean(value_P, int(count_P.sum()), confidence)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct_PK: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Accuracy of the most frequent answer of each problem's samples, with the clustered interval.

    None (no answer could be read) does not vote; a tie scores the mean of the tied answers; no vote at all scores 0.
    """
    correct_PK = np.asarray(correct_PK, dtype=np.float64)
    if len(answers) != len(correct_PK) or any(len(a) != correct_PK.shape[1] for a in answers):
        raise DataError("answers and correct_PK do not have the same problems and samples")
    value_P = [
        _majority(row, right_K) for row, right_K in zip(answers, correct_PK, strict=True) if not np.isnan(right_K).all()
    ]
    if not value_P:
        raise DataError("no graded sample to vote on", remedy="See the grader errors counted in the evaluation.")
    return clustered_mean(np.array(value_P), int((~np.isnan(correct_PK)).sum()), confidence)


def _majority(answers: Sequence[str | None], right_K: np.ndarray) -> float:
    votes: dict[str, list[float]] = {}
    for answer, right in zip(answers, right_K, strict=True):
        if answer is not None and not np.isnan(right):
            votes.setdefault(answer, []).append(float(right))
    if not votes:
        return 0.0
    most = max(len(group) for group in votes.values())
    return float(np.mean([np.mean(group) for group in votes.values() if len(group) == most]))


def clustered_mean(value_P: np.ndarray, n_samples: int, confidence: float = 0.95) -> Estimate:
    """Mean of per-problem values in [0, 1], with the interval described at the top of this file."""
    value_P = np.asarray(value_P, dtype=np.float64)
    problems, mean = len(value_P), float(np.mean(value_P))
    if problems < 2:
        return Estimate(mean, 0.0, 1.0, problems, n_samples)
    smoothed = (problems * mean + 1) / (problems + 2)
    variance = (((value_P - mean) ** 2).sum() + smoothed * (1 - smoothed)) / problems
    # Fully dependent samples are worth one a problem, independent ones K a problem: never outside of that.
    effective = min(max(mean * (1 - mean) * problems / variance, problems), max(n_samples, problems))
    t = t_quantile((1 + confidence) / 2, problems - 1)
    centre, spread = mean + t * t / (2 * effective), mean * (1 - mean) / effective + (t / (2 * effective)) ** 2
    half, scale = t * math.sqrt(spread), 1 + t * t / effective
    # min and max with the mean: rounding must not push the interval off its own estimate at 0 and 1.
    low, high = max(0.0, min((centre - half) / scale, mean)), min(1.0, max((centre + half) / scale, mean))
    return Estimate(mean, low, high, problems, n_samples)


def ratio_of_sums(
    sum_G: np.ndarray,
    count_G: np.ndarray,
    confidence: float = 0.95,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> Estimate:
    """sum(sum_G) / sum(count_G) over G clusters of different sizes (nats over tokens, say), with a t interval.

    The variance is the linearised one, G/(G-1) sum (sum_g - value count_g)^2 / total^2 (Cochran 1977, 6.13): tokens of
    one cluster count as dependent. `lowest` and `highest` cut the interval at the quantity's bounds. n_problems is G.
    """
    sum_G, count_G = np.asarray(sum_G, dtype=np.float64), np.asarray(count_G, dtype=np.float64)
    kept = count_G > 0
    sum_G, count_G, total = sum_G[kept], count_G[kept], float(count_G.sum())
    clusters = len(sum_G)
    if clusters == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    value = float(sum_G.sum() / total)
    if clusters == 1:
        return Estimate(value, lowest, highest, 1, int(total))
    error = math.sqrt(clusters / (clusters - 1) * float(((sum_G - value * count_G) ** 2).sum())) / total
    half = t_quantile((1 + confidence) / 2, clusters - 1) * error
    return Estimate(value, max(lowest, value - half), min(highest, value + half), clusters, int(total))


def paired_difference(
    a_PK: np.ndarray, b_PK: np.ndarray, confidence: float = 0.95, permutations: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Mean over the shared problems of a - b with its interval and the p-value of the sign-flip permutation test.

    The two may have different K. Under the null hypothesis each problem's difference is as likely to be its negative; p
    is the share of sign assignments whose mean is at least as far from 0 as the one seen. Exact, by building the whole
    distribution, unless the differences' common denominator makes that too long; then `permutations` seeded draws with
    +1 on both counts. For K = 1 the exact p-value is McNemar's exact test.
    """
    (right_aP, count_aP), (right_bP, count_bP) = _paired_counts(a_PK, b_PK)
    difference_P = right_aP / count_aP - right_bP / count_bP
    samples = (count_aP.mean() + count_bP.mean()) / 2
    low, high = _paired_interval(difference_P, samples, confidence)
    unit = math.lcm(*{int(n) for n in count_aP} | {int(n) for n in count_bP})
    p_value, method = sign_flip_p_value(difference_P, unit, permutations, seed)
    return PairedDifference(float(difference_P.mean()), low, high, p_value, method, len(difference_P))


def sign_flip_p_value(
    difference_P: np.ndarray, unit: int, permutations: int = 10_000, seed: int = 0
) -> tuple[float, str]:
    """(two-sided p-value, method). `unit`: every difference times it is a whole number."""
    steps = np.rint(np.abs(difference_P) * unit).astype(np.int64)
    observed = abs(int(np.rint(difference_P * unit).astype(np.int64).sum()))
    steps = np.sort(steps[steps > 0])  # a zero has no sign to flip
    if len(steps) == 0:
        return 1.0, "exact"
    if int(np.cumsum(2 * steps + 1).sum()) <= _MAX_EXACT_WORK:
        return _exact_tail(steps, observed), "exact"
    rng, hits = np.random.default_rng(seed), 0
    for start in range(0, permutations, 256):
        signs = rng.integers(0, 2, size=(min(256, permutations - start), len(steps))) * 2 - 1
        hits += int((np.abs(signs @ steps) >= observed).sum())
    return (hits + 1) / (permutations + 1), "monte carlo"


def _exact_tail(steps: np.ndarray, observed: int) -> float:
    """P(|sum of +-steps| >= observed) by adding one problem at a time to the distribution of the sum."""
    chance, reach = np.ones(1), 0  # chance[i] is that of the sum i - reach
    for step in steps:
        wider = np.zeros(len(chance) + 2 * step)
        wider[: len(chance)] += 0.5 * chance
        wider[2 * step :] += 0.5 * chance
        chance, reach = wider, reach + int(step)
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, chance[np.abs(sums) >= observed].sum()))


def _paired_interval(difference_P: np.ndarray, samples: float, confidence: float) -> tuple[float, float]:
    problems = len(difference_P)
    if problems < 2:
        return -1.0, 1.0
    mean = difference_P.sum() / (problems + 2)
    variance = ((difference_P**2).sum() + 2 * samples**-0.5) / (problems + 2) - mean**2
    half = t_quantile((1 + confidence) / 2, problems - 1) * math.sqrt(max(variance, 0.0) / (problems + 2))
    return max(-1.0, float(mean - half)), min(1.0, float(mean + half))


def gap_recovered(
    student_PK: np.ndarray, teacher_PK: np.ndarray, base_PK: np.ndarray, confidence: float = 0.95
) -> GapRecovered:
    """How much of the teacher's lead over the base the student has, with Fieller's interval over the shared problems.

    Solves for the ratios r at which the paired interval of (student - base) - r (teacher - base) holds 0. Undefined
    (None) when the interval of teacher - base itself holds 0, or lies below it: then there is no gap to recover.
    """
    counts = _paired_counts(student_PK, teacher_PK, base_PK)
    student_P, teacher_P, base_P = (right / count for right, count in counts)
    gain_P, gap_P = student_P - base_P, teacher_P - base_P
    problems, samples = len(gap_P), float(np.mean([count.mean() for _, count in counts]))
    low, high = _paired_interval(gap_P, samples, confidence)
    if low <= 0:
        which = "may be zero" if high >= 0 else "is negative"
        return GapRecovered(None, None, None, f"the teacher's lead over the base {which}: [{low:.3f}, {high:.3f}]")
    size, pseudo = problems + 2, 2 * samples**-0.5
    gain, gap = gain_P.sum() / size, gap_P.sum() / size
    k = t_quantile((1 + confidence) / 2, problems - 1) ** 2 / size
    a = gap**2 - k * (((gap_P**2).sum() + pseudo) / size - gap**2)
    b = gain * gap - k * ((gain_P * gap_P).sum() / size - gain * gap)
    c = gain**2 - k * (((gain_P**2).sum() + pseudo) / size - gain**2)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return GapRecovered(float(gain / gap), float((b - root) / a), float((b + root) / a))


def bootstrap_gap(
    student_PK: np.ndarray,
    teacher_PK: np.ndarray,
    base_PK: np.ndarray,
    confidence: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the gap recovered by resampling problems (percentiles): a check on Fieller's interval."""
    student_P, teacher_P, base_P = (r / n for r, n in _paired_counts(student_PK, teacher_PK, base_PK))
    problems = len(base_P)
    weight_BP = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=draws)
    gain_B, gap_B = weight_BP @ (student_P - base_P), weight_BP @ (teacher_P - base_P)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_B = np.where(gap_B > 0, gain_B / gap_B, np.where(gain_B > 0, np.inf, -np.inf))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratio_B, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in the given order: min over later ranks of (m - rank) p (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@lru_cache(maxsize=256)
def t_quantile(p: float, df: int) -> float:
    """The p-quantile (0.5 <= p < 1) of Student's t with whole df, by bisection of the finite series for its
    distribution function (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        j = np.arange(1, (df - 1) // 2)
        series = cosine * (1 + np.cumprod(2 * j / (2 * j + 1) * cosine**2).sum()) if df > 1 else 0.0
        return 0.5 + (angle + sine * float(series)) / math.pi
    j = np.arange(1, df // 2)
    return 0.5 + sine * float(1 + np.cumprod((2 * j - 1) / (2 * j) * cosine**2).sum()) / 2


def _counts(correct_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(right_P, count_P), int64, of the problems that have at least one graded sample."""
    return _paired_counts(correct_PK)[0]


def _paired_counts(*models_PK: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(right_P, count_P) of each model over the problems on which all of them have a graded sample."""
    arrays = [np.asarray(correct_PK, dtype=np.float64) for correct_PK in models_PK]
    if any(a.ndim != 2 or len(a) != len(arrays[0]) for a in arrays):
        shapes = [a.shape for a in arrays]
        raise DataError("correctness must be [problems, samples] over the same problems", value=shapes)
    if any(not np.isin(a[~np.isnan(a)], (0.0, 1.0)).all() for a in arrays):
        raise DataError("correctness must be 0, 1 or NaN (a sample the grader failed on)")
    kept = np.all([(~np.isnan(a)).any(axis=1) for a in arrays], axis=0)
    if not kept.any():
        raise DataError("no problem has a graded sample", remedy="See the grader errors counted in the evaluation.")
    return [
        (np.nansum(a[kept], axis=1).astype(np.int64), (~np.isnan(a[kept])).sum(axis=1).astype(np.int64)) for a in arrays
    ]
