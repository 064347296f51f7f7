"""Laws of targets over buckets of tokens: against float64 autograd, and against the sparse loss they generalise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import DataError
from distill.losses.buckets import BucketedTargets
from distill.losses.divergence import DIVERGENCES, dense_divergence
from distill.losses.fused import distill_loss
from distill.losses.sparse import SparseTargets

F64 = torch.float64


def random_buckets(draw, tokens, vocab, most):
    """Per token a random partition of part of the vocabulary, and a random teacher over its parts and the rest."""
    rows, masses = [], []
    for _ in range(tokens):
        order = torch.randperm(vocab, generator=draw).tolist()
        sizes = torch.randint(1, 4, (int(torch.randint(most + 1, (), generator=draw)),), generator=draw).tolist()
        parts = []
        for size in sizes:
            parts.append([order.pop() for _ in range(min(size, len(order)))])
        parts = [part for part in parts if part]
        rows.append(parts)
        mass = torch.rand(len(parts) + 1, generator=draw, dtype=F64)
        if not order:
            mass[-1] = 0
        masses.append(mass / mass.sum())
    return rows, masses


def as_targets(rows, masses, vocab):
    members, groups = max(sum(map(len, parts)) for parts in rows), max(map(len, rows))
    ids, group = torch.zeros(len(rows), members, dtype=torch.int64), torch.full((len(rows), members), -1)
    logprobs, tail = torch.full((len(rows), groups), -torch.inf, dtype=F64), torch.zeros(len(rows), dtype=F64)
    for n, (parts, mass) in enumerate(zip(rows, masses)):
        flat = [(token, g) for g, part in enumerate(parts) for token in part]
        for k, (token, g) in enumerate(flat):
            ids[n, k], group[n, k] = token, g
        logprobs[n, : len(parts)], tail[n] = mass[:-1].log(), mass[-1]
    return BucketedTargets(ids, group, logprobs, tail)


def plain_loss(z, labels, rows, masses, name, alpha):
    """sum of alpha (D(Q, P) - log P(label | its bucket)) + (1 - alpha) CE, by autograd on full logits."""
    total = 0.0
    for n, (parts, mass) in enumerate(zip(rows, masses)):
        logp = torch.log_softmax(z[n], 0)
        inside = [token for part in parts for token in part]
        rest = [token for token in range(len(logp)) if token not in inside]
        sets = [*parts, rest] if rest else parts
        y = torch.stack([torch.logsumexp(logp[part], 0) for part in sets])
        target = mass[: len(sets)].log()
        home = next(i for i, part in enumerate(sets) if int(labels[n]) in part)
        within = y[home] - logp[labels[n]]
        total = total + alpha * (dense_divergence(name, y[None], target[None])[0] + within)
        total = total - (1 - alpha) * logp[labels[n]]
    return total


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(DIVERGENCES), st.integers(1, 5), st.integers(1, 9), st.integers(0, 5))
def test_value_and_gradients_equal_float64_autograd(seed, name, tokens, vocab, most):
    draw = torch.Generator().manual_seed(seed)
    rows, masses = random_buckets(draw, tokens, vocab, most)
    states, head = (torch.randn(n, 4, generator=draw, dtype=F64).requires_grad_() for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=draw)
    expected = plain_loss(states @ head.T, labels, rows, masses, name, 0.8) / 3
    wanted = torch.autograd.grad(expected, (states, head))
    targets = as_targets(rows, masses, vocab)
    loss, metrics = distill_loss(
        states, head, labels, targets=targets, alpha=0.8, divergence=name, normalizer=3, chunk_tokens=2
    )
    found = torch.autograd.grad(loss, (states, head))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    entropy = torch.distributions.Categorical(logits=states @ head.T).entropy().sum()
    torch.testing.assert_close(metrics.entropy, entropy.detach(), rtol=1e-6, atol=1e-6)


def test_buckets_of_one_member_that_hold_the_label_are_the_sparse_loss_bit_for_bit():
    states, head = torch.randn(30, 8), torch.randn(40, 8)
    labels = torch.randint(40, (30,))
    teacher = torch.softmax(torch.randn(30, 40), 1).scatter(1, labels[:, None], 0.9)
    mass, ids = (teacher / teacher.sum(1, keepdim=True)).topk(6)
    tail = 1 - mass.sum(1)
    group = torch.arange(6).expand(30, 6)
    results = []
    for targets in (SparseTargets(ids, mass.log(), tail), BucketedTargets(ids, group, mass.log(), tail)):
        x, w = states.clone().requires_grad_(), head.clone().requires_grad_()
        loss, metrics = distill_loss(x, w, labels, targets=targets, alpha=1.0, normalizer=30)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad, metrics.as_tensor()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_row_without_outcomes_is_cross_entropy():
    states, head, labels = torch.randn(5, 8, dtype=F64), torch.randn(12, 8, dtype=F64), torch.randint(12, (5,))
    nothing = BucketedTargets(
        torch.zeros(5, 3, dtype=torch.int64), torch.full((5, 3), -1), torch.full((5, 2), -torch.inf, dtype=F64),
        torch.ones(5, dtype=F64),
    )  # fmt: skip
    loss, metrics = distill_loss(states, head, labels, targets=nothing, alpha=1.0, normalizer=5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(states @ head.T, labels))
    assert metrics.teacher_tokens == 0


def test_by_hand():
    """P = (1/2, 1/4, 1/8, 1/8); buckets {0, 2} and {1}; Q = (1/2, 1/4), rest 1/4; the label is token 2."""
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=F64)
    targets = BucketedTargets(
        torch.tensor([[0, 2, 1]]), torch.tensor([[0, 0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25])
    )
    loss = distill_loss(p.log(), torch.eye(4, dtype=F64), torch.tensor([2]), targets=targets, alpha=1, normalizer=1)[0]
    kl = 0.5 * torch.tensor(0.5 / 0.625).log() + 0.25 * torch.tensor(0.25 / 0.125).log()
    assert loss.item() == pytest.approx(kl.item() - torch.tensor(0.125 / 0.625).log().item(), abs=1e-6)


def test_a_token_in_two_buckets_and_masses_past_one_are_refused():
    good = (torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0.0]))
    BucketedTargets(*good).check(4)
    for members in range(1, 40):  # equal shares of many members need not sum to 1 in float32
        one = torch.zeros(1, members, dtype=torch.int64)
        BucketedTargets(torch.arange(members)[None], one, torch.zeros(1, 1), torch.zeros(1)).check(40)
    with pytest.raises(DataError, match="twice"):
        BucketedTargets(torch.tensor([[1, 1]]), *good[1:]).check(4)
    with pytest.raises(DataError, match="sum to 1"):
        BucketedTargets(*good[:3], torch.tensor([0.4])).check(4)
    with pytest.raises(DataError, match="outside the student's 1"):
        BucketedTargets(*good).check(1)
