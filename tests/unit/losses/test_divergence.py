"""Laws of the dense divergences: values by hand, zero at equality, limits in beta, gradients against float64
autograd."""

import math

import loss_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import ConfigError
from distill.losses.divergence import DIVERGENCES, dense_divergence


def value_and_grad(name, student, teacher, **options):
    student = student.clone().requires_grad_()
    value = dense_divergence(name, student, teacher, **options)
    value.sum().backward()
    return value.detach(), student.grad


# teacher (1/2, 1/2), student (1/4, 3/4); m = (3/8, 5/8) for beta 1/2
BY_HAND = {
    "forward_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    "reverse_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
    "jsd": 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
    + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
    "skew_kl": 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5),
    "total_variation": 0.25,
}
BY_HAND["scaled_jsd"] = 4 * BY_HAND["jsd"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_on_two_outcomes_by_hand(name):
    value = dense_divergence(name, torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(BY_HAND[name], abs=1e-7)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_value_and_zero_gradient_where_student_is_teacher(name, temperature, beta):
    logits = torch.randn(20, 50, dtype=torch.float32) * 5
    value, grad = value_and_grad(name, logits, logits + 3.0, beta=beta, temperature=temperature)
    assert value.abs().max() < 2e-6 * max(1, temperature**2)
    assert grad.abs().max() < 2e-6 * max(1, temperature)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(DIVERGENCES), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9),
    st.floats(0.01, 0.99), st.floats(0.3, 5.0), st.floats(0.1, 8.0),
)  # fmt: skip
def test_value_and_gradient_equal_float64_autograd(name, seed, tokens, vocab, beta, temperature, spread):
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, vocab, generator=draw, dtype=torch.float64) * spread
    teacher = torch.randn(tokens, vocab, generator=draw, dtype=torch.float64) * spread
    plain = student.clone().requires_grad_()
    masses = torch.softmax(teacher, 1), torch.softmax(plain, 1)
    expected = reference.token_divergence(name, *masses, beta, temperature)
    expected.sum().backward()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 3e-5)):
        value, grad = value_and_grad(name, student.to(dtype), teacher.to(dtype), beta=beta, temperature=temperature)
        scale = 1 + expected.detach().abs().max() + temperature**2
        assert (value - expected).abs().max() <= tolerance * scale
        assert (grad - plain.grad).abs().max() <= tolerance * scale


@pytest.mark.parametrize("name", DIVERGENCES)
def test_adding_a_constant_to_the_logits_changes_nothing(name):
    student, teacher = torch.randn(8, 30, dtype=torch.float64), torch.randn(8, 30, dtype=torch.float64)
    value, grad = value_and_grad(name, student, teacher)
    shifted_value, shifted_grad = value_and_grad(name, student + 100.0, teacher - 50.0)
    torch.testing.assert_close(value, shifted_value, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, shifted_grad, rtol=0, atol=1e-12)
    assert grad.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_is_continuous_in_beta_at_both_ends(end, limit):
    student, teacher = torch.randn(16, 40), torch.randn(16, 40)
    kl, kl_grad = value_and_grad(limit, student, teacher)
    for step in (1e-3, 1e-5, 1e-7):
        beta = abs(end - step)
        scaled, scaled_grad = value_and_grad("scaled_jsd", student, teacher, beta=beta)
        assert (scaled - kl).abs().max() < 200 * step + 2e-5
        assert (scaled_grad - kl_grad).abs().max() < 200 * step + 2e-5
        jsd, _ = value_and_grad("jsd", student, teacher, beta=beta)
        assert (jsd / step - kl).abs().max() < 200 * step + 2e-5  # GKD's own limit: JSD / beta is the KL
        assert jsd.abs().max() < 200 * step  # and JSD itself goes to 0, without a jump to a KL
    at_end, grad_at_end = value_and_grad("scaled_jsd", student, teacher, beta=end)
    torch.testing.assert_close(at_end, kl, rtol=0, atol=0)
    torch.testing.assert_close(grad_at_end, kl_grad, rtol=0, atol=0)


def test_jsd_at_one_half_is_symmetric_and_at_most_log_two():
    student, teacher = torch.randn(16, 40) * 20, torch.randn(16, 40) * 20
    value = dense_divergence("jsd", student, teacher)
    torch.testing.assert_close(value, dense_divergence("jsd", teacher, student))
    assert value.max() <= math.log(2) + 1e-6


def test_skew_kl_without_skew_is_forward_kl():
    student, teacher = torch.randn(16, 40), torch.randn(16, 40)
    for ours, expected in zip(
        value_and_grad("skew_kl", student, teacher, beta=0.0), value_and_grad("forward_kl", student, teacher)
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", set(DIVERGENCES) - {"total_variation"})
def test_gradient_keeps_its_size_at_high_temperature(name):
    """T^2 D -> (D'' / 2) Var(student - teacher logits) as T grows: the same limit at T = 100 and T = 200, not a
    quarter."""
    student, teacher = torch.randn(4, 10, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    _, grad = value_and_grad(name, student, teacher, temperature=100.0)
    _, grad_of_twice = value_and_grad(name, student, teacher, temperature=200.0)
    torch.testing.assert_close(grad, grad_of_twice, rtol=0, atol=0.05 * grad.abs().max().item())
    if name == "forward_kl":
        difference = student - teacher
        expected = (difference - difference.mean(1, keepdim=True)) / 10
        torch.testing.assert_close(grad, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [1e-6, 0.5, 1 - 1e-6])
def test_logits_of_ten_thousand_give_finite_values_and_gradients(name, beta):
    size = 1e4
    student = torch.tensor([[size, -size, 0.0], [-size, size, 0.0], [size, size, -size], [size, -size, -size]])
    teacher = torch.tensor([[-size, size, 0.0], [-size, size, 0.0], [size, -size, size], [size, -size, -size]])
    value, grad = value_and_grad(name, student, teacher, beta=beta)
    assert value.isfinite().all() and grad.isfinite().all()
    assert value[1].abs() < 1e-6 and value[3].abs() < 1e-6  # equal rows
    if name in ("forward_kl", "reverse_kl"):
        assert value[0].item() == pytest.approx(2e4)
    if name == "total_variation":
        assert value[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "beta"), [("jsd", 0.0), ("jsd", 1.0), ("skew_kl", 1.0), ("scaled_jsd", 1.5), ("skew_kl", -0.1)]
)
def test_beta_that_makes_the_loss_vanish_or_undefined_is_refused(name, beta):
    with pytest.raises(ConfigError, match="beta"):
        dense_divergence(name, torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)


def test_unknown_divergence_and_temperature_zero_are_refused():
    with pytest.raises(ConfigError, match="forward_kl"):
        dense_divergence("kl", torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="temperature"):
        dense_divergence("jsd", torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)
