"""Laws of the K+1 divergences: full support is dense, the tail counts, padding and empty rows are harmless."""

import itertools
import math

import pytest
import torch

from distill.errors import DataError
from distill.losses.divergence import DIVERGENCES, dense_divergence
from distill.losses.sparse import SparseTargets, mask_support_, outcome_logits, sparse_divergence

INF = float("inf")


def targets_of(teacher_logits, k):
    """The k most likely tokens of each row with their true log-probabilities and the exact rest."""
    logprobs = torch.log_softmax(teacher_logits, 1)
    top, ids = logprobs.topk(k, 1)
    inside = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, ids, True)
    return SparseTargets(ids, top, logprobs.exp().masked_fill(inside, 0).sum(1))


def value_and_grad(name, logits, targets, **options):
    logits = logits.clone().requires_grad_()
    value = sparse_divergence(name, logits, targets, **options)
    value.sum().backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_full_support_equals_dense(name, temperature):
    student, teacher = torch.randn(30, 25, dtype=torch.float64) * 3, torch.randn(30, 25, dtype=torch.float64) * 3
    value, grad = value_and_grad(name, student, targets_of(teacher, 25), temperature=temperature)
    dense_student = student.clone().requires_grad_()
    dense = dense_divergence(name, dense_student, teacher, temperature=temperature)
    dense.sum().backward()
    torch.testing.assert_close(value, dense.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, dense_student.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 24])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_where_student_is_teacher(name, k, temperature):
    teacher = torch.randn(30, 25) * 4
    value, grad = value_and_grad(name, teacher - 7.0, targets_of(teacher, k), temperature=temperature)
    assert value.abs().max() < 3e-6 * max(1, temperature**2)
    assert grad.abs().max() < 3e-6 * max(1, temperature)


def test_forward_kl_is_the_formula_with_both_tails():
    """teacher (1/2, 1/4 | 1/4), student (1/4, 1/4, 1/4, 1/4): support {0, 1}, tails 1/4 and 1/2."""
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]))
    value, grad = value_and_grad("forward_kl", torch.zeros(1, 4), targets)
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(1 / 2))
    # p - t on the support, (1 - T/S) p off it
    torch.testing.assert_close(grad, torch.tensor([[0.25 - 0.5, 0.25 - 0.25, 0.125, 0.125]]))


def test_mass_leaked_out_of_the_support_is_punished():
    """Right ratios inside the support and 60 % of the mass outside: positive loss, gradient pulls the leak back."""
    inside, outside = torch.tensor([0.5, 0.3, 0.199]), torch.full((7,), 0.001 / 7)
    targets = SparseTargets(torch.tensor([[0, 1, 2]]), inside.log()[None], torch.tensor([0.001]))
    leaking = torch.cat([inside * 0.4 / 0.999, outside * 600])
    for name in DIVERGENCES:
        honest, _ = value_and_grad(name, torch.cat([inside, outside]).log()[None], targets)
        value, grad = value_and_grad(name, leaking.log()[None], targets)
        assert honest.abs() < 1e-6
        assert value > 0.05
        assert (grad[0, 3:] > 0).all() and grad[0, :3].sum() < 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_coarser_support_never_raises_the_loss(name):
    """Merging outcomes cannot increase an f-divergence."""
    student, teacher = torch.randn(40, 30, dtype=torch.float64) * 2, torch.randn(40, 30, dtype=torch.float64) * 2
    values = [sparse_divergence(name, student, targets_of(teacher, k)) for k in (1, 3, 10, 30)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_changes_nothing_and_an_empty_row_says_nothing(name):
    student, teacher = torch.randn(3, 12), torch.randn(3, 12)
    tight = targets_of(teacher, 4)
    ids = torch.cat([tight.ids_NK, torch.full((3, 3), 11)], 1)  # the padded id may be a real token of any row
    ids[1, 4:] = tight.ids_NK[1, 0]
    padded = SparseTargets(ids, torch.cat([tight.logprobs_NK, torch.full((3, 3), -INF)], 1), tight.tail_N)
    for ours, expected in zip(value_and_grad(name, student, padded), value_and_grad(name, student, tight)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    empty = SparseTargets(torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), -INF), torch.ones(3))
    value, grad = value_and_grad(name, student, empty)
    assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_masking_in_place_splits_the_logits_as_the_differentiable_form_does():
    logits = torch.randn(6, 9)
    targets = targets_of(torch.randn(6, 9), 4)
    targets.logprobs_NK[2] = -INF
    targets.logprobs_NK[3, 2:] = -INF
    expected = outcome_logits(logits, targets)
    rest = logits.clone()
    support, _ = mask_support_(rest, targets)
    torch.testing.assert_close(support, expected[:, :-1])
    torch.testing.assert_close(torch.logsumexp(rest, 1), expected[:, -1])
    torch.testing.assert_close(expected[2, -1], torch.logsumexp(logits[2], 0))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("gap", [50.0, 200.0, 1e4])
def test_tail_below_float32_of_either_side_gives_finite_gradients(name, gap):
    student = torch.tensor([[gap, 0.0, 0.0, 0.0], [0.0, gap, gap, gap]])
    for tail in (0.0, 1e-30, 0.1):
        logprobs = torch.full((2, 1), math.log1p(-tail))
        value, grad = value_and_grad(
            name, student, SparseTargets(torch.zeros(2, 1, dtype=torch.int64), logprobs, torch.full((2,), tail))
        )
        assert value.isfinite().all() and grad.isfinite().all()
        if name == "forward_kl" and tail == 0.1:  # S = 3 exp(-gap): far below float32 for gap 200, and still exact
            assert value[0].item() == pytest.approx(
                0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + gap - math.log(3)), rel=1e-5
            )
            torch.testing.assert_close(grad[0], torch.tensor([0.1, -0.1 / 3, -0.1 / 3, -0.1 / 3]))


def test_targets_that_cannot_be_right_are_refused():
    good = targets_of(torch.randn(2, 6), 3)
    good.check(6)
    with pytest.raises(DataError, match=r"row 1.*outside the student's 5"):
        SparseTargets(torch.tensor([[0, 1], [2, 5]]), torch.tensor([[0.5, 0.5]] * 2).log(), torch.zeros(2)).check(5)
    with pytest.raises(DataError, match=r"row 0.*sum to 1"):
        SparseTargets(good.ids_NK, good.logprobs_NK - 0.5, good.tail_N * 0).check(6)
    with pytest.raises(DataError, match="sum to 1"):
        SparseTargets(good.ids_NK, good.logprobs_NK, torch.full((2,), float("nan"))).check(6)
    with pytest.raises(DataError, match="twice"):
        SparseTargets(torch.tensor([[3, 3]]), torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1)).check(6)
    with pytest.raises(DataError, match="fit together"):
        SparseTargets(good.ids_NK, good.logprobs_NK, torch.zeros(3)).check(6)
