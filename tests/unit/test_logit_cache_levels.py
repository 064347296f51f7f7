"""Laws of the cache's rounding and of its columns, against formulas worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache_levels import LOG_BOUND, SQRT_STEP, level, logprob
from distill.cache_planes import ColumnReader, compressor, write_column


def test_hand_computed_levels():
    """Steps of 1/128 in sqrt(p): p = 1, 1/4, 1/16 lie at 0, 64, 96; the knee at sqrt(p) = 1/32 at 124; then 2 a nat."""
    masses = np.array([1.0, 1 / 4, 1 / 16, 1 / 1024, np.exp(-3) / 1024])
    assert level(np.log(masses), 1 / 128, 1 / 4).tolist() == pytest.approx([0, 64, 96, 124, 130])
    assert np.exp(logprob(np.array([0, 64, 96, 124, 130]), 1 / 128, 1 / 4)) == pytest.approx(masses)


@pytest.mark.parametrize(("sqrt_step", "log_bound"), [(SQRT_STEP, LOG_BOUND), (1 / 300, 0.1), (1 / 40, 0.5)])
def test_levels_grow_as_masses_fall_and_have_an_inverse(sqrt_step, log_bound):
    logprobs = -np.sort(np.random.default_rng(0).exponential(6, 100_000))
    levels = level(logprobs, sqrt_step, log_bound)
    assert (np.diff(levels) >= 0).all() and levels[0] >= 0
    np.testing.assert_allclose(logprob(levels, sqrt_step, log_bound), logprobs, atol=1e-9)
    knee = 2 * np.log(sqrt_step / log_bound)
    slopes = np.diff(level(knee + np.array([-2e-6, -1e-6, 1e-6, 2e-6]), sqrt_step, log_bound)) / np.array([1, 2, 1])
    np.testing.assert_allclose(slopes, -1e-6 / (2 * log_bound), rtol=1e-4)  # no jump and no kink at the knee


@pytest.mark.parametrize(("sqrt_step", "log_bound"), [(SQRT_STEP, LOG_BOUND), (1 / 300, 0.1), (1 / 40, 0.5)])
def test_no_log_probability_is_off_by_more_than_the_bound(sqrt_step, log_bound):
    logprobs = -np.concatenate([np.linspace(0, 20, 1_000_001), np.linspace(20, 600, 100_001)])
    errors = np.abs(logprob(np.rint(level(logprobs, sqrt_step, log_bound)), sqrt_step, log_bound) - logprobs)
    assert errors.max() <= log_bound + 1e-9
    assert errors[logprobs > -0.1].max() <= 1.1 * sqrt_step  # half a step of sqrt(p) near p = 1 is a step of log(p)


def test_an_entry_costs_a_sixth_of_the_squared_step_whatever_its_mass():
    """E[p log(p/p') - p + p'] = SQRT_STEP^2 / 6 in each decade of mass above the knee, and less below it."""
    draw = np.random.default_rng(1)
    for low, high in ((0.1, 1.0), (0.01, 0.1), (2e-3, 0.01)):
        masses = draw.uniform(np.sqrt(low), np.sqrt(high), 400_000) ** 2
        rounded = np.exp(logprob(np.rint(level(np.log(masses)))))
        cost = masses * np.log(masses / rounded) - masses + rounded
        assert cost.mean() == pytest.approx(SQRT_STEP**2 / 6, rel=0.06)
    masses = np.exp(draw.uniform(np.log(1e-7), np.log((SQRT_STEP / LOG_BOUND) ** 2), 400_000))
    rounded = np.exp(logprob(np.rint(level(np.log(masses)))))
    cost = masses * np.log(masses / rounded) - masses + rounded
    assert cost.mean() == pytest.approx((masses * LOG_BOUND**2 / 6).mean(), rel=0.06)  # variance (2 b)^2 / 12, halved
    assert cost.mean() < SQRT_STEP**2 / 6


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 400), st.sampled_from([1, 2, 200, 256, 70_000, 2**24, 2**32 - 1]))
def test_any_column_comes_back(seed, count, top):
    draw = np.random.default_rng(seed)
    columns = [draw.integers(0, draw.integers(1, top + 1), count, endpoint=True) for _ in range(3)]
    columns.append((draw.random(count) < 0.02) * top)
    data = b"".join(write_column(column, compressor()) for column in columns)
    reader = ColumnReader(data)
    for column in columns:
        found = reader.read(count)
        assert found.dtype in (np.uint8, np.uint16, np.uint32)
        np.testing.assert_array_equal(found, column)
    assert reader._at == len(data)


def test_a_column_costs_about_its_entropy():
    """Geometric values of 2 bits a value; a constant costs three bytes."""
    values = np.random.default_rng(2).geometric(0.5, 50_000) - 1
    assert len(write_column(values, compressor())) * 8 / len(values) == pytest.approx(2, rel=0.05)
    assert len(write_column(np.full(50_000, 77), compressor())) == 3
