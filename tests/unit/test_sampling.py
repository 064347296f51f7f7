"""Laws of the draw and of the capture, against float64 references and transformers' own logits warpers."""

import math

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from distill.records import CaptureSpec, SamplingParams
from distill.sampling import StepLogits, _splitmix64, capture_support, draw, top_candidates, uniform

LAST = 1 - 2.0**-53  # the largest uniform there is


def logits(rows: int, vocab: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def uniforms(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def from_probabilities(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def reference_draw(kept_AV: np.ndarray, uniform_A: np.ndarray) -> list[int]:
    """The first id whose cumulative probability exceeds u; ids with -inf are filtered out. Plain float64."""
    tokens = []
    for row, u in zip(kept_AV.astype(np.float64), uniform_A):
        weights = np.exp(row - row.max())
        tokens.append(int(np.argmax(np.cumsum(weights) > u * weights.sum())))
    return tokens


def warped(logits_AV: torch.Tensor, params: SamplingParams) -> np.ndarray:
    scores = TemperatureLogitsWarper(float(params.temperature))(None, logits_AV.double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.numpy()


def test_splitmix64_gives_the_published_first_output_of_seed_1234567():
    first_state = np.array([1234567 + 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert _splitmix64(first_state)[0] == 6457827717110365317


def test_uniform_is_the_hash_written_with_python_integers():
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    seeds, positions = [0, 1, 2**63 - 1, 987654321], [0, 7, 100_000, 3]
    expected = [
        (mix((mix(s) + (t + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53 for s, t in zip(seeds, positions)
    ]
    assert uniform(np.array(seeds), np.array(positions)).tolist() == expected


def test_uniforms_of_a_stream_and_across_streams_are_uniform_and_uncorrelated():
    count = 20_000
    stream = uniform(np.full(count, 42), np.arange(count))
    across = uniform(np.arange(count), np.zeros(count, dtype=np.int64))
    for u in (stream, across):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(count)
        bins = np.bincount((u * 100).astype(int), minlength=100)
        assert ((bins - count / 100) ** 2 / (count / 100)).sum() < 99 + 5 * math.sqrt(2 * 99)


@pytest.mark.parametrize("vocab", [2, 5, 31, 32, 33, 600, 3001])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_unfiltered_draw_is_the_inverse_cdf_over_ids(vocab, temperature):
    logits_AV, uniform_A = logits(64, vocab, 3.0, vocab), uniforms(64, vocab)
    drawn = draw(StepLogits(logits_AV), uniform_A, SamplingParams(temperature, 1.0, 0))
    assert drawn.tolist() == reference_draw((logits_AV.double() / temperature).numpy(), uniform_A.numpy())


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0], ids=["flat", "medium", "peaked"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.6, 0.95, 0),
        SamplingParams(1.0, 0.5, 0),
        SamplingParams(1.0, 1.0, 1),
        SamplingParams(0.8, 1.0, 20),
        SamplingParams(0.7, 0.9, 50),
        SamplingParams(1.3, 0.99, 700),
    ],
    ids=str,
)
def test_filtered_draw_equals_transformers_warpers(params, scale):
    logits_AV, uniform_A = logits(48, 1500, scale, 3), uniforms(48, 3)
    drawn = draw(StepLogits(logits_AV), uniform_A, params)
    assert drawn.tolist() == reference_draw(warped(logits_AV, params), uniform_A.numpy())


def test_hand_computed_draws():
    # Cumulative by id: 0.1, 0.5, 0.7, 1.0. top_p 0.6 keeps ids 1 (0.4) and 3 (0.3): cumulative 0.4/0.7 = 0.571, 1.
    logits_1V = from_probabilities(0.1, 0.4, 0.2, 0.3)
    unfiltered, nucleus, two = SamplingParams(1, 1, 0), SamplingParams(1, 0.6, 0), SamplingParams(1, 1, 2)
    for params, u, token in [
        (unfiltered, 0.0, 0),
        (unfiltered, 0.0999, 0),
        (unfiltered, 0.1001, 1),
        (unfiltered, 0.6999, 2),
        (unfiltered, LAST, 3),
        (nucleus, 0.0, 1),
        (nucleus, 0.57, 1),
        (nucleus, 0.572, 3),
        (two, LAST, 3),
    ]:
        assert draw(StepLogits(logits_1V), torch.tensor([u], dtype=torch.float64), params).item() == token, (params, u)


def test_top_p_zero_leaves_the_most_likely_token():
    logits_AV = logits(8, 100, 2.0)
    assert torch.equal(draw(StepLogits(logits_AV), uniforms(8), SamplingParams(1.0, 0.0, 0)), logits_AV.argmax(-1))


def test_every_tie_at_a_cut_is_kept():
    logits_1V = torch.zeros(1, 500)  # all 500 tied: neither cut can tell them apart
    for params in (SamplingParams(1, 1, 3), SamplingParams(1, 0.1, 0), SamplingParams(1, 0.1, 3)):
        drawn = [draw(StepLogits(logits_1V), torch.tensor([u]).double(), params).item() for u in (0.0, 0.501, LAST)]
        assert drawn == [0, 250, 499]


def test_temperature_zero_is_argmax_whatever_the_filters():
    logits_AV = logits(16, 333, 1.0)
    assert torch.equal(draw(StepLogits(logits_AV), uniforms(16), SamplingParams(0, 0.5, 7)), logits_AV.argmax(-1))


@pytest.mark.parametrize("params", [SamplingParams(1, 1, 0), SamplingParams(0.7, 0.9, 0)], ids=str)
def test_frequencies_follow_the_filtered_distribution(params):
    count, logits_1V = 20_000, logits(1, 40, 1.5)
    drawn = draw(
        StepLogits(logits_1V.expand(count, -1)),
        torch.from_numpy(uniform(np.full(count, 5), np.arange(count))),
        params,
    )
    expected = torch.softmax(torch.from_numpy(warped(logits_1V, params)), -1)[0].numpy() * count
    observed = np.bincount(drawn.numpy(), minlength=40)
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < kept.sum() + 5 * math.sqrt(2 * kept.sum())


@pytest.mark.parametrize("params", [SamplingParams(1, 1, 0), SamplingParams(0.8, 0.95, 0)], ids=str)
def test_a_row_draws_the_same_token_alone_and_in_a_batch(params):
    logits_AV, uniform_A = logits(33, 3000, 3.0), uniforms(33)
    together = draw(StepLogits(logits_AV), uniform_A, params)
    alone = [draw(StepLogits(logits_AV[i : i + 1]), uniform_A[i : i + 1], params).item() for i in range(33)]
    assert together.tolist() == alone


@pytest.mark.parametrize("vocab", [10, 1023, 1024, 3001])
def test_top_candidates_are_those_of_topk(vocab):
    logits_AV = logits(20, vocab, 1.0)
    values_AK, ids_AK = top_candidates(logits_AV, 8)
    assert torch.equal(values_AK, logits_AV.topk(8).values)
    assert torch.equal(logits_AV.gather(1, ids_AK), values_AK)
    assert all(len(set(row)) == 8 for row in ids_AK.tolist())


def support(logits_AV: torch.Tensor, sampled: list[int], spec: CaptureSpec):
    """[(ids, logprobs, tail, logsumexp)] a row."""
    found = capture_support(StepLogits(logits_AV), torch.tensor(sampled), spec)
    return [
        (ids[:count].tolist(), logprobs[:count].double(), tail.item(), logsumexp.item())
        for ids, logprobs, count, tail, logsumexp in zip(
            found.ids_AK, found.logprobs_AK, found.count_A, found.tail_A, found.logsumexp_A
        )
    ]


@pytest.mark.parametrize(
    ("sampled", "k_max", "bound", "ids", "tail"),
    [
        (0, 4, 0.13, [0, 1, 2], 0.125),  # 0.5 + 0.25 leave 0.25, one more leaves 0.125 <= 0.13
        (3, 4, 0.13, [0, 1, 2, 3], 0.0),  # the sampled token joins
        (0, 2, 0.13, [0, 1], 0.25),  # k_max ends it first
        (3, 2, 0.13, [0, 3], 0.375),  # and the sampled token then replaces the least likely
        (3, 1, 0.13, [3], 0.875),
        (0, 4, 0.6, [0], 0.5),
        (0, 4, 1.0, [0], 0.5),  # the bound never asks for an empty support
    ],
)
def test_hand_computed_supports(sampled, k_max, bound, ids, tail):
    probabilities = (0.5, 0.25, 0.15, 0.1) if bound == 0.13 else (0.5, 0.25, 0.125, 0.125)
    if bound == 0.13:
        tail = {(0, 4): 0.1, (3, 4): 0.0, (0, 2): 0.25, (3, 2): 0.4, (3, 1): 0.9}[sampled, k_max]
    ((found, logprobs, outside, logsumexp),) = support(
        from_probabilities(*probabilities) + 2.0, [sampled], CaptureSpec(k_max, bound)
    )
    assert found == ids
    assert torch.allclose(logprobs.exp(), torch.tensor([probabilities[i] for i in ids]).double(), atol=1e-6)
    assert outside == pytest.approx(tail, abs=1e-6)
    assert logsumexp == pytest.approx(2.0, abs=1e-6)  # probabilities sum to 1, so log sum exp(log p + 2) = 2


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0], ids=["flat", "medium", "peaked"])
@pytest.mark.parametrize("k_max", [1, 5, 64, 2000])
def test_support_is_the_shortest_prefix_under_the_bound_with_exact_tail(scale, k_max):
    spec, logits_AV = CaptureSpec(k_max, 1e-3), logits(40, 1111, scale, 7)
    sampled = draw(StepLogits(logits_AV), uniforms(40), SamplingParams(1, 1, 0)).tolist()
    exact_AV = logits_AV.double().log_softmax(-1)
    for row, (ids, logprobs, tail, logsumexp) in enumerate(support(logits_AV, sampled, spec)):
        exact = exact_AV[row]
        assert torch.allclose(logprobs, exact[ids], atol=2e-6)
        assert logsumexp == pytest.approx(logits_AV[row].double().logsumexp(-1).item(), abs=2e-6)
        outside = torch.ones(1111, dtype=torch.bool)
        outside[ids] = False
        assert tail == pytest.approx(exact[outside].exp().sum().item(), rel=1e-5)
        assert sampled[row] in ids and len(set(ids)) == len(ids) <= k_max
        assert (logprobs[1:] <= logprobs[:-1] + 1e-9).all()
        needed = min(k_max, int((1 - exact.exp().sort(descending=True).values.cumsum(0) > 1e-3).sum()) + 1)
        assert len(ids) in ({needed} if sampled[row] in ids[:needed] else {needed + 1})


def test_tail_far_below_fp32_resolution_keeps_its_digits():
    logits_1V = torch.full((1, 1001), -30.0)
    logits_1V[0, 17] = 0.0
    ((ids, _, tail, _),) = support(logits_1V, [17], CaptureSpec(64, 1e-3))
    assert ids == [17]
    assert tail == pytest.approx(1000 * math.exp(-30), rel=1e-5)  # 9.4e-11: 1 - p would give 0 in fp32


def test_capture_leaves_the_draw_alone():
    step, params = StepLogits(logits(16, 800, 2.0)), SamplingParams(1, 1, 0)
    before = draw(step, uniforms(16), params)
    capture_support(step, before, CaptureSpec())
    assert torch.equal(draw(step, uniforms(16), params), before)
