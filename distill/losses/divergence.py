"""Divergences between two next-token distributions: per-token values in nats and closed-form gradients to the logits.

Teacher t, student p, both over the same V outcomes. With w_j = p_j dD/dp_j the gradient to the student's logits is
w_j - p_j sum_i w_i, so each divergence is one function that returns its value and w; terms of dD/dp_j that do not
depend on j drop out of the difference and are left out of w.

| name            | D(t, p)                                          | w_j                      |
|-----------------|--------------------------------------------------|--------------------------|
| forward_kl      | sum t log(t/p)                                   | -t                       |
| reverse_kl      | sum p log(p/t)                                   | p log(p/t)               |
| jsd             | b KL(t, m) + (1-b) KL(p, m), m = b t + (1-b) p   | (1-b) p log(p/m)         |
| scaled_jsd      | jsd / (b (1-b))                                  | p log(p/m) / b           |
| skew_kl         | KL(t, m), the same m                             | -(1-b) t p/m             |
| total_variation | 1/2 sum |t - p|                                  | 1/2 p sign(p - t)        |

jsd is the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024); it falls to 0 at b = 0 and b = 1.
scaled_jsd is the same up to a constant and continuous on [0, 1]: forward KL at 0, reverse KL at 1, and the same
curvature at t = p for every b. skew_kl is that of DistiLLM (Ko et al. 2024) with skew b.

Temperature: D is taken between softmax(logits / T) of both sides and multiplied by T^2, which is part of the definition
(Hinton et al. 2015): the gradient keeps its size when T grows.

Shape legend: N tokens, V outcomes (the vocabulary, or the K+1 of a sparse target).
"""

import math

import torch
from torch import Tensor

from distill.errors import ConfigError

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "scaled_jsd", "skew_kl", "total_variation")

# Stands for log 0 before a softmax: finite, so that 0 * LOG_ZERO is 0 and LOG_ZERO - LOG_ZERO is 0, where -inf gives
# NaN.
LOG_ZERO = -1e30
# log of the smallest normal float32, which stands for log 0 after a softmax. A mass of exactly zero in storage means
# only
# "below what float32 holds"; reverse KL against it must be large, not infinite.
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def check_settings(name: str, beta: float, temperature: float) -> None:
    """Raise ConfigError for an unknown divergence or a beta or temperature outside its bounds."""
    if name not in DIVERGENCES:
        raise ConfigError(
            "unknown divergence", where="loss.divergence", value=name, remedy=f"Use one of {', '.join(DIVERGENCES)}."
        )
    inside = {"jsd": 0 < beta < 1, "scaled_jsd": 0 <= beta <= 1, "skew_kl": 0 <= beta < 1}.get(name, True)
    if not inside:
        remedy = (
            "Use forward_kl or reverse_kl, or scaled_jsd, whose limits they are."
            if name == "jsd"
            else "Use 0 <= beta < 1."
        )
        raise ConfigError(
            f"{name} is zero for every student or undefined at this beta", where="loss.beta", value=beta, remedy=remedy
        )
    if not 0 < temperature < math.inf:
        raise ConfigError(
            "must be > 0", where="loss.temperature", value=temperature, remedy="Use 1.0 to leave logits unchanged."
        )


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) [N, V], with outcomes of no mass (LOG_ZERO or -inf logits) at LOG_TINY."""
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    logp_NV = torch.log_softmax(scaled_NV, -1)
    return logp_NV.masked_fill_(logits_NV < LOG_ZERO / 2, LOG_TINY)


def _log_mixture_ratios(x_NV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m/p) and log(m/t) for m = beta t + (1-beta) p and x = log(t/p).

    Both by log1p of the small side: relative to beta (or 1-beta) exact, where a logaddexp would lose all digits as beta
    goes to 0 or 1. Past |x| = 20 one comes from the other, because expm1 would overflow.
    """
    from_p_NV = torch.log1p(beta * torch.expm1(x_NV.clamp(max=20.0)))
    from_t_NV = torch.log1p((1 - beta) * torch.expm1((-x_NV).clamp(max=20.0)))
    if beta == 0.0 or beta == 1.0:  # one of the logs is of a zero mass ratio there; take it from the other
        return (from_p_NV, -x_NV) if beta == 0.0 else (x_NV, from_t_NV)
    log_m_p_NV = torch.where(x_NV < 20.0, from_p_NV, x_NV + from_t_NV)
    log_m_t_NV = torch.where(x_NV > -20.0, from_t_NV, from_p_NV - x_NV)
    return log_m_p_NV, log_m_t_NV


def _forward_kl(p_NV, logp_NV, t_NV, logt_NV, beta):
    return (logt_NV - logp_NV).mul_(t_NV).sum(-1), -t_NV


def _reverse_kl(p_NV, logp_NV, t_NV, logt_NV, beta):
    w_NV = (logp_NV - logt_NV).mul_(p_NV)
    return w_NV.sum(-1), w_NV


def _jsd(p_NV, logp_NV, t_NV, logt_NV, beta):
    log_m_p_NV, log_m_t_NV = _log_mixture_ratios(logt_NV - logp_NV, beta)
    w_NV = log_m_p_NV.mul_(p_NV).mul_(-(1 - beta))
    return (w_NV - log_m_t_NV.mul_(t_NV).mul_(beta)).sum(-1), w_NV


def _scaled_jsd(p_NV, logp_NV, t_NV, logt_NV, beta):
    if beta == 0.0:
        return _forward_kl(p_NV, logp_NV, t_NV, logt_NV, beta)
    if beta == 1.0:
        return _reverse_kl(p_NV, logp_NV, t_NV, logt_NV, beta)
    value_N, w_NV = _jsd(p_NV, logp_NV, t_NV, logt_NV, beta)
    scale = 1 / (beta * (1 - beta))
    return value_N * scale, w_NV.mul_(scale)


def _skew_kl(p_NV, logp_NV, t_NV, logt_NV, beta):
    log_m_p_NV, log_m_t_NV = _log_mixture_ratios(logt_NV - logp_NV, beta)
    return -log_m_t_NV.mul_(t_NV).sum(-1), log_m_p_NV.neg_().exp_().mul_(t_NV).mul_(-(1 - beta))


def _total_variation(p_NV, logp_NV, t_NV, logt_NV, beta):
    difference_NV = p_NV - t_NV
    # |x| has a kink at 0, where any slope in [-1, 1] is a subgradient: where p and t differ by rounding alone, take 0.
    rounding_NV = t_NV * (64 * torch.finfo(t_NV.dtype).eps)
    difference_NV.masked_fill_(difference_NV.abs() <= rounding_NV, 0)
    return difference_NV.abs().sum(-1).mul_(0.5), difference_NV.sign_().mul_(p_NV).mul_(0.5)


_RULES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "scaled_jsd": _scaled_jsd,
    "skew_kl": _skew_kl,
    "total_variation": _total_variation,
}


def value_and_logit_grad(name: str, logp_NV: Tensor, logt_NV: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """D(t, p) [N] in nats and its gradient [N, V] to the logits behind logp, both in the dtype of the inputs.

    logp_NV, logt_NV: normalised log-probabilities without -inf (see log_softmax). No graph is recorded or needed.
    """
    p_NV, t_NV = logp_NV.exp(), logt_NV.exp()
    value_N, w_NV = _RULES[name](p_NV, logp_NV, t_NV, logt_NV, beta)
    grad_NV = w_NV.sub_(p_NV.mul_(w_NV.sum(-1, keepdim=True)))
    return value_N, grad_NV


def tempered_value_and_grad(
    name: str, logits_NV: Tensor, teacher_logits_NV: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 D(softmax(teacher / T), softmax(student / T)) [N] and its gradient [N, V] to the student's logits."""
    logp_NV = log_softmax(logits_NV, temperature)
    logt_NV = log_softmax(teacher_logits_NV, temperature)
    value_N, grad_NV = value_and_logit_grad(name, logp_NV, logt_NV, beta)
    if temperature != 1.0:
        value_N, grad_NV = value_N.mul_(temperature**2), grad_NV.mul_(temperature)
    return value_N, grad_NV


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, teacher_logits_NV, name, beta, temperature):
        value_N, grad_NV = tempered_value_and_grad(name, logits_NV, teacher_logits_NV, beta, temperature)
        ctx.save_for_backward(grad_NV)
        return value_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_N):
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * upstream_N.unsqueeze(-1), None, None, None, None


def dense_divergence(
    name: str, logits_NV: Tensor, teacher_logits_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """D_N [N], float32 nats per token (float64 for float64 input), differentiable once in the student's logits.

    logits_NV, teacher_logits_NV: [N, V] raw logits or log-probabilities; the teacher gets no gradient. Formulas: top
    of the file. Raises ConfigError for an unknown name, beta or temperature out of bounds.
    """
    check_settings(name, beta, temperature)
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    return _Divergence.apply(logits_NV.to(dtype), teacher_logits_NV.detach().to(dtype), name, beta, temperature)
