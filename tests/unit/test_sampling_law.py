"""The law of drawn tokens, from a stored support, is that of the whole distribution after temperature and filters."""

import math

import numpy as np
import pytest
import torch

from distill.errors import ConfigError
from distill.records import CaptureSpec, SamplingParams, TokenDists
from distill.sampling import StepLogits, capture_support, draw
from distill.sampling_law import sampling_law

VOCAB, ROWS = 200, 40


def whole_law(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64 probabilities [V] of one position, filter after filter as `draw` states them."""
    if params.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    weights = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k:
        weights[weights < np.sort(weights)[-params.top_k]] = 0
    if params.top_p < 1:
        more_likely = np.array([weights[weights > w].sum() for w in weights])
        inside = more_likely < params.top_p * weights.sum()
        inside[weights.argmax()] = True
        weights = np.where(inside, weights, 0)
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def stored(logits_AV: torch.Tensor, params: SamplingParams, spec: CaptureSpec) -> TokenDists:
    """What a capture keeps of these positions, each with a token drawn from it."""
    step = StepLogits(logits_AV)
    sampled_A = draw(step, torch.rand(len(logits_AV), dtype=torch.float64), params)
    support = capture_support(step, sampled_A, spec)
    counts = support.count_A.tolist()
    pick = lambda rows: np.concatenate([row[:n].numpy() for row, n in zip(rows, counts)])  # noqa: E731
    return TokenDists(
        np.append(0, np.cumsum(counts)), pick(support.ids_AK), pick(support.logprobs_AK), support.tail_A.numpy(),
        support.logsumexp_A.numpy(), sampled_A.int().numpy(),
    )  # fmt: skip


def dense(dists: TokenDists) -> np.ndarray:
    """float64 [T, V] of the stored entries."""
    found = np.zeros((len(dists), VOCAB))
    token_S = np.repeat(np.arange(len(dists)), np.diff(dists.offsets_T1))
    found[token_S, dists.ids_S] = np.exp(dists.logprobs_S)
    return found


EXACT = [  # filters that end inside a support of all but 1e-3
    SamplingParams(0.6, 0.95),
    SamplingParams(1.0, 0.9),
    SamplingParams(0.8, 0.99, 5),
    SamplingParams(0.0, 1.0),
    SamplingParams(0.7, 1.0, 2),
    SamplingParams(1.0, 1.0, min_p=0.05),
    SamplingParams(0.5, 0.0),
]


@pytest.mark.parametrize("params", EXACT, ids=str)
def test_filters_that_end_inside_the_support_give_the_law_itself(params):
    logits_AV = torch.randn(ROWS, VOCAB) * 4
    dists = sampling_law(stored(logits_AV, params, CaptureSpec(64, 1e-3)), params)
    wanted = np.stack([whole_law(row, params) for row in logits_AV.double().numpy()])
    # top_p counts the mass of all tokens; of those not stored it knows the bound alone
    boundary = np.abs(dense(dists) - wanted).max(1) > 1e-5
    assert boundary.mean() <= 0.05 and (dists.tail_T == 0).all()
    assert np.allclose(dense(dists)[~boundary].sum(1), 1, atol=1e-6)


def test_temperature_1_without_filters_changes_nothing():
    before = stored(torch.randn(ROWS, VOCAB) * 4, SamplingParams(1.0, 1.0), CaptureSpec(16, 1e-2))
    after = sampling_law(before, SamplingParams(1.0, 1.0))
    assert np.array_equal(after.ids_S, before.ids_S) and np.array_equal(after.offsets_T1, before.offsets_T1)
    assert np.allclose(after.logprobs_S, before.logprobs_S, atol=1e-6) and np.allclose(after.tail_T, before.tail_T)


@pytest.mark.parametrize("params", [SamplingParams(0.6, 1.0), SamplingParams(0.9, 0.999), SamplingParams(1.0, 1.0, 30)])
def test_a_tail_that_no_filter_ends_keeps_at_most_its_share(params):
    logits_AV = torch.randn(ROWS, VOCAB) * 2
    before = stored(logits_AV, params, CaptureSpec(8, 1e-4))
    after = sampling_law(before, params)
    total = np.bincount(np.repeat(np.arange(ROWS), np.diff(after.offsets_T1)), np.exp(after.logprobs_S)) + after.tail_T
    assert np.allclose(total, 1, atol=1e-5) and (after.tail_T > 0).any()
    assert (after.tail_T <= before.tail_T * (1 + 1e-5)).all()


def test_the_drawn_token_stays_wherever_rounding_puts_it():
    logprobs = np.log(np.array([0.94, 0.03, 0.02], np.float32))
    one = TokenDists(np.array([0, 3]), np.array([4, 5, 6], np.int32), logprobs, np.array([0.01], np.float32),
                     np.zeros(1, np.float32), np.array([6], np.int32))  # fmt: skip
    law = sampling_law(one, SamplingParams(1.0, 0.9))
    assert law.ids_S.tolist() == [4, 6]
    assert np.exp(law.logprobs_S).tolist() == pytest.approx([0.94 / 0.96, 0.02 / 0.96], rel=1e-5)


def test_by_hand_at_half_the_temperature():
    logprobs = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    one = TokenDists(np.array([0, 3]), np.array([4, 5, 6], np.int32), logprobs, np.zeros(1, np.float32),
                     np.zeros(1, np.float32), np.array([4], np.int32))  # fmt: skip
    law = sampling_law(one, SamplingParams(0.5, 0.95))  # squares 0.36, 0.09, 0.01: the first two are 0.978 of them
    assert law.ids_S.tolist() == [4, 5]
    assert law.logprobs_S.tolist() == pytest.approx([math.log(0.8), math.log(0.2)], rel=1e-5)


def test_hotter_than_1_is_refused():
    before = stored(torch.randn(2, VOCAB), SamplingParams(1.0, 1.0), CaptureSpec(16, 1e-2))
    with pytest.raises(ConfigError, match="hotter than temperature 1"):
        sampling_law(before, SamplingParams(1.2, 1.0))
