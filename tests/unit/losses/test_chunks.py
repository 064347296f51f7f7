"""The binary likelihood of chunks against its definition in float64."""

import math

import numpy as np
import pytest
import torch

from distill.losses.chunks import chunk_divergence, chunk_logprobs, tangent


def random_logs(seed, low=-30.0, count=400):
    return np.append(np.random.default_rng(seed).uniform(low, -1e-3, count), [-1e-6, -60.0])


def by_definition(teacher, student, temperature):
    q, p = (np.exp(np.asarray(x, np.longdouble) / temperature) for x in (teacher, student))
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_it_is_the_divergence_of_two_yes_or_no_questions(temperature):
    teacher, student = random_logs(0), random_logs(1)
    found = chunk_divergence(torch.tensor(teacher), torch.tensor(student), temperature)
    np.testing.assert_allclose(found, by_definition(teacher, student, temperature).astype(float), rtol=1e-7, atol=1e-14)
    assert (found >= 0).all()
    single = chunk_divergence(torch.tensor(teacher).float(), torch.tensor(student).float(), temperature)
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=2e-6)


def test_by_hand():
    # The teacher says 1/2, the student 1/4: 1/2 ln 2 + 1/2 ln (2/3).
    found = chunk_divergence(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]))
    assert float(found) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_equal_likelihoods_cost_nothing_and_pull_nowhere():
    logs = torch.tensor(random_logs(2), requires_grad=True)
    loss = chunk_divergence(logs.detach(), logs)
    loss.sum().backward()
    assert loss.detach().abs().max() < 1e-12 and logs.grad.abs().max() < 1e-9


def test_the_gradient_is_finite_everywhere_and_that_of_the_definition():
    """d/d log p = (p - q) / (1 - p)."""
    teacher, student = torch.tensor([-0.7, -3.0, 0.0, 0.0, -40.0]), torch.tensor([-3.0, -0.7, -2.0, 0.0, 0.0])
    student.requires_grad_()
    loss = chunk_divergence(teacher, student)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
    p, q = student.detach().double().exp()[:3], teacher.double().exp()[:3]
    torch.testing.assert_close(student.grad[:3].double(), (p - q) / (1 - p), rtol=1e-4, atol=1e-6)


def test_a_chunk_is_the_sum_of_its_tokens():
    logp, chunk = torch.randn(9, dtype=torch.float64), torch.tensor([0, 0, 1, 3, 3, 3, 2, 1, 0])
    found = chunk_logprobs(logp, chunk, 5)
    expected = [sum(float(v) for v, c in zip(logp, chunk) if c == k) for k in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_a_chunk_may_lie_anywhere_if_its_sums_are_added_up(seed):
    """Any split of the tokens has the slopes and the value of all of them; without the sums of the others neither."""
    draw = torch.Generator().manual_seed(seed)
    chunk = torch.randint(-1, 5, (30,), generator=draw)
    logp = -torch.rand(30, generator=draw, dtype=torch.float64)
    teacher = torch.rand(6, generator=draw, dtype=torch.float64).log()[chunk]
    slope, offset = tangent(logp, chunk, teacher)
    names = chunk[chunk >= 0].unique()
    sums = torch.stack([torch.stack([logp[chunk == c].sum(), (chunk == c).sum()]) for c in names])
    for mine in ((part := torch.rand(30, generator=draw) < 0.4), ~part, torch.zeros(30, dtype=torch.bool)):
        found = tangent(logp[mine], chunk[mine], teacher[mine], lambda own, _: sums[torch.searchsorted(names, own)])
        for a, b in zip(found, (slope[mine], offset[mine])):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    alone, _ = tangent(logp[part], chunk[part], teacher[part])
    assert (alone - slope[part]).abs().max() > 1e-3
