"""Drawing the tail of a captured distribution: masses, and the gradient of the loss on them, are unbiased estimates.

Expectations over the random number are taken exactly where they can be: the estimate is a step function of u.
"""

import dataclasses

import pytest
import torch

from distill.cache_levels import LOG_BOUND
from distill.logit_cache import CacheHeader, CacheReader, CacheWriter, to_sparse_targets
from distill.losses.divergence import dense_divergence
from distill.losses.sparse import SparseTargets, sparse_divergence
from distill.records import CaptureSpec
from distill.sampling import StepLogits, capture_support, draw_tail
from distill.step_log import Tokens

VOCAB, POINTS = 150, 20_000
SPEC = CaptureSpec(k_max=5, tail_bound=1e-3, tail_draws=3)


def random_logits(seed, spread=2.0):
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def targets_of(support):
    """SparseTargets of a captured support, padded by -inf."""
    stored_AK = torch.arange(support.ids_AK.shape[1]) < support.count_A.unsqueeze(1)
    return SparseTargets(support.ids_AK.long(), support.logprobs_AK.masked_fill(~stored_AK, -torch.inf), support.tail_A)


def dense_of(support):
    """float64 [A, V]: the stored masses at their ids."""
    targets = targets_of(support)
    masses = targets.logprobs_NK.double().exp()
    return torch.zeros(len(masses), VOCAB, dtype=torch.float64).scatter_add_(1, targets.ids_NK, masses)


def at_every_u(logits_1V, sampled, spec):
    """The support at each of POINTS values of u spread evenly over [0, 1): the mean over rows is the mean over u."""
    points = ((torch.arange(POINTS) + 0.5) / POINTS).double()
    step = StepLogits(logits_1V.expand(POINTS, VOCAB).contiguous())
    return capture_support(step, torch.full((POINTS,), sampled), spec, points)


@pytest.mark.parametrize(("seed", "draws"), [(0, 1), (1, 3), (2, 8), (3, 150)])
def test_expected_masses_are_the_dense_ones_and_each_draw_sums_to_one(seed, draws):
    logits, spec = random_logits(seed), dataclasses.replace(SPEC, tail_draws=draws)
    plain = capture_support(StepLogits(logits), torch.tensor([50]), dataclasses.replace(spec, tail_draws=0))
    found = at_every_u(logits, 50, spec)
    masses, exact = dense_of(found), dense_of(plain)
    torch.testing.assert_close(masses.sum(1), torch.ones(POINTS, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not found.tail_A.any() and plain.tail_A > 0.01
    assert (found.count_A <= plain.count_A + draws).all()
    logprobs = targets_of(found).logprobs_NK
    assert (logprobs[:, 1:] <= logprobs[:, :-1]).all()  # most likely first, padding last
    torch.testing.assert_close(masses[:, exact[0] > 0], exact[:, exact[0] > 0].expand(POINTS, -1))  # stays exact
    # A mass is a step function of u with at most two steps a draw, each of tail / draws.
    torch.testing.assert_close(masses.mean(0), logits[0].double().softmax(-1), atol=2 / POINTS, rtol=0)


def test_expected_loss_gradient_is_the_dense_one_where_that_of_the_bare_tail_mass_is_not():
    """d forward KL / d student logits over u against the dense KL; K + 1 outcomes alone know nothing inside the
    tail."""
    teacher, student = random_logits(10, 1.0), random_logits(11, 1.0).double().requires_grad_()
    (dense,) = torch.autograd.grad(dense_divergence("forward_kl", student, teacher.double()).sum(), student)

    def gradient(support):
        targets = targets_of(support)
        logits = student.expand(len(targets.tail_N), VOCAB)
        return torch.autograd.grad(sparse_divergence("forward_kl", logits, targets).mean(), student)[0]

    mean = gradient(at_every_u(teacher, 50, SPEC))
    torch.testing.assert_close(mean, dense, atol=2 / POINTS, rtol=0)
    biased = gradient(capture_support(StepLogits(teacher), torch.tensor([50]), dataclasses.replace(SPEC, tail_draws=0)))
    assert (biased - dense).abs().max() > 50 * (mean - dense).abs().max()


def test_without_random_numbers_the_draw_is_a_function_of_the_logits_and_averages_out_over_rows():
    """Over rows of the same distribution shifted by constants, which change nothing but the hash."""
    base, shifts = random_logits(20), torch.linspace(0, 5, 3000).unsqueeze(1)
    step, sampled = StepLogits(base + shifts), torch.zeros(3000, dtype=torch.int64)
    found, again = (capture_support(step, sampled, SPEC) for _ in range(2))
    assert torch.equal(found.ids_AK, again.ids_AK)
    masses, true = dense_of(found), base[0].double().softmax(-1)
    plain = capture_support(step, sampled, dataclasses.replace(SPEC, tail_draws=0))
    hit = float(plain.tail_A[0]) / SPEC.tail_draws  # the mass that one draw stands for
    error = (masses.mean(0) - true).abs()
    assert (error < 5 * (true * hit / 3000).sqrt() + 3 * hit / 3000).all()
    alone = capture_support(StepLogits(base + shifts[7:8]), sampled[:1], SPEC)
    assert torch.equal(alone.ids_AK[0, : alone.count_A[0]], found.ids_AK[7, : found.count_A[7]])


def test_rows_whose_support_is_everything_have_nothing_to_draw_from():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, :3] = torch.tensor([1.0, 0.5, 0.0])
    found = capture_support(StepLogits(logits), torch.tensor([0, 2]), CaptureSpec(VOCAB, 0.0, tail_draws=4))
    plain = capture_support(StepLogits(logits), torch.tensor([0, 2]), CaptureSpec(VOCAB, 0.0))
    for one in (found, draw_tail(StepLogits(logits), found, 4)):
        torch.testing.assert_close(one.tail_A, plain.tail_A)
        torch.testing.assert_close(dense_of(one), dense_of(plain), atol=1e-6, rtol=0)


def test_drawn_supports_pass_through_the_cache(tmp_path):
    sampled = torch.tensor([3, 50, 149, 0])
    support = capture_support(StepLogits(torch.cat([random_logits(seed) for seed in range(4)])), sampled, SPEC)
    dists = Tokens.of(sampled.numpy(), support).dists()
    with CacheWriter(tmp_path / "a.cache", CacheHeader("a", "b", "c", VOCAB, 5, 1e-3, tail_draws=3)) as writer:
        writer.append("x/0", dists)
    found = SparseTargets(*map(torch.from_numpy, to_sparse_targets(CacheReader(tmp_path / "a.cache")["x/0"])))
    found.check(VOCAB)
    masses = torch.zeros(4, VOCAB, dtype=torch.float64).scatter_add_(1, found.ids_NK, found.logprobs_NK.double().exp())
    wanted = dense_of(support)
    assert torch.equal(masses > 0, wanted > 0) and not found.tail_N.any()
    assert (masses[wanted > 0].log() - wanted[wanted > 0].log()).abs().max() < 2 * LOG_BOUND
