"""Laws of the loss on text that the teacher only read: against float64 autograd, token by token and chunk by chunk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buckets import F64, as_targets, random_buckets

from distill.losses.buckets import BucketedTargets
from distill.losses.chunks import chunk_divergence
from distill.losses.divergence import dense_divergence
from distill.losses.fused import distill_loss


def random_text(draw, tokens, chunks):
    """(drawn_N, chunk_N, chunk_logprobs_N): each token drawn or not, in one of some chunks or in none."""
    drawn = torch.rand(tokens, generator=draw) < 0.5
    chunk = torch.randint(-1, chunks, (tokens,), generator=draw)
    teacher = (torch.rand(chunks + 1, generator=draw, dtype=F64) * 0.98 + 0.01).log()
    return drawn, torch.where(chunk < 0, -1, chunk * 7 + 3), teacher[chunk]


def plain_loss(z, labels, rows, masses, text, alpha):
    """sum of alpha (D(Q, P) - drawn log P(label | its bucket)) + (1 - alpha) CE, and alpha times that of the chunks."""
    drawn, chunk, teacher = text
    logp = torch.log_softmax(z, 1)
    own = logp.gather(1, labels[:, None]).squeeze(1)
    total = -(1 - alpha) * own.sum()
    for n, (parts, mass) in enumerate(zip(rows, masses)):
        rest = [token for token in range(z.shape[1]) if not any(token in part for part in parts)]
        sets = [*parts, rest] if rest else parts
        y = torch.stack([torch.logsumexp(logp[n, part], 0) for part in sets])
        total = total + alpha * dense_divergence("forward_kl", y[None], mass[: len(sets)].log()[None])[0]
        if drawn[n]:
            total = total + alpha * (next(y[i] for i, part in enumerate(sets) if int(labels[n]) in part) - own[n])
    for c in chunk[chunk >= 0].unique():
        inside = chunk == c
        total = total + alpha * chunk_divergence(teacher[inside][:1], own[inside].sum()[None])[0]
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(2, 9), st.integers(0, 4), st.integers(1, 4))
def test_value_and_gradients_equal_float64_autograd(seed, tokens, vocab, most, chunks):
    draw = torch.Generator().manual_seed(seed)
    rows, masses = random_buckets(draw, tokens, vocab, most)
    text = random_text(draw, tokens, chunks)
    states, head = (torch.randn(n, 4, generator=draw, dtype=F64).requires_grad_() for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=draw)
    expected = plain_loss(states @ head.T, labels, rows, masses, text, 0.8) / 3
    wanted = torch.autograd.grad(expected, (states, head))
    plain = as_targets(rows, masses, vocab)
    targets = BucketedTargets(plain.ids_NK, plain.group_NK, plain.logprobs_NG, plain.tail_N, *text)
    loss, _ = distill_loss(states, head, labels, targets=targets, alpha=0.8, normalizer=3, chunk_tokens=2)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-9)
    for a, b in zip(torch.autograd.grad(loss, (states, head)), wanted):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def a_batch(seed=0, tokens=40, vocab=50):
    draw = torch.Generator().manual_seed(seed)
    rows, masses = random_buckets(draw, tokens, vocab, 6)
    plain = as_targets(rows, masses, vocab)
    states, head = (torch.randn(n, 8, generator=draw) for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=draw)
    return states, head, labels, plain, random_text(draw, tokens, 6)


def with_text(plain, text):
    return BucketedTargets(plain.ids_NK, plain.group_NK, plain.logprobs_NG, plain.tail_N, *text)


def test_text_that_was_drawn_is_the_loss_of_before_bit_for_bit():
    states, head, labels, plain, _ = a_batch()
    everything = (torch.ones(40, dtype=torch.bool), torch.full((40,), -1), torch.zeros(40))
    found = [
        distill_loss(states, head, labels, targets=targets, alpha=0.7, normalizer=40)[0]
        for targets in (plain, with_text(plain, everything))
    ]
    assert torch.equal(*found)


def test_where_nothing_is_known_of_read_text_it_bears_no_loss():
    states, head, labels, _, _ = a_batch()
    nothing = BucketedTargets(
        torch.zeros(40, 3, dtype=torch.int64), torch.full((40, 3), -1), torch.full((40, 2), -torch.inf), torch.ones(40),
        torch.zeros(40, dtype=torch.bool), torch.full((40,), -1), torch.zeros(40),
    )  # fmt: skip
    states.requires_grad_()
    loss, _ = distill_loss(states, head, labels, targets=nothing, alpha=1.0, normalizer=40)
    loss.backward()
    assert loss.abs() < 1e-6 and states.grad.abs().max() < 1e-6


def test_rows_that_are_ignored_and_weights_and_sets_reach_the_chunks_too():
    states, head, labels, plain, text = a_batch(3)
    chunk = torch.full((40,), -1)
    chunk[:20] = torch.arange(20) // 4
    targets = with_text(plain, (text[0], chunk, text[2].new_zeros(40) - 0.7))
    weights, sets = torch.ones(40), torch.zeros(40, dtype=torch.int64)
    weights[:20], sets[:20] = 3.0, 1
    parts = torch.zeros(2, dtype=F64)
    options = {"targets": targets, "alpha": 1.0, "normalizer": 5}
    whole, _ = distill_loss(states, head, labels, **options, weights_N=weights, set_N=sets, set_losses_S=parts)
    halves = [distill_loss(states, head, torch.where(sets == s, labels, -100), **options)[0] for s in (0, 1)]
    assert whole.item() == pytest.approx((halves[0] + 3 * halves[1]).item(), rel=1e-5)
    assert parts.tolist() == pytest.approx([halves[0].item(), 3 * halves[1].item()], rel=1e-5)


def test_a_chunk_that_is_all_but_certain_to_the_student_has_a_small_gradient():
    """Its distance from certainty is rounding; a slope that divided by that would be noise."""
    head = torch.eye(6)
    states = torch.zeros(3, 6)
    states[:, 2] = 30.0
    states.requires_grad_()
    targets = BucketedTargets(
        torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), -1), torch.full((3, 1), -torch.inf), torch.ones(3),
        torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), torch.full((3,), -0.7),
    )  # fmt: skip
    loss, _ = distill_loss(states, head, torch.full((3,), 2), targets=targets, alpha=1.0, normalizer=1)
    loss.backward()
    assert torch.isfinite(loss) and states.grad.abs().max() < 1


def single_precision_is_double_precision(device: str = "cpu") -> None:
    states, head, labels, plain, text = a_batch(5)
    found = []
    for dtype, place in ((torch.float32, device), (F64, "cpu")):
        x, w = (each.detach().clone().to(place, dtype).requires_grad_() for each in (states, head))
        targets = with_text(plain, text).to(place)
        loss, metrics = distill_loss(x, w, labels.to(place), targets=targets, alpha=0.9, normalizer=40)
        loss.backward()
        found.append([each.double().cpu() for each in (loss.detach(), x.grad, w.grad, metrics.as_tensor())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_single_precision_computes_the_same():
    single_precision_is_double_precision()


@pytest.mark.gpu
def test_a_gpu_computes_the_same():
    single_precision_is_double_precision("cuda")


def test_the_kernels_compute_the_same():
    """Interpreted, in a process of its own: TRITON_INTERPRET must be set before they are imported."""
    pytest.importorskip("triton")
    code = "import test_chunks_fused as t; t.single_precision_is_double_precision(); print('equal')"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "equal", done.stderr
