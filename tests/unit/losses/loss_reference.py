"""The losses written once more, as plainly as the formulas, on full logits in float64, with gradients by autograd."""

import torch


def _xlogy(x, y):
    """x log y with 0 log anything = 0, also in the gradient."""
    inside = x > 0
    return torch.where(inside, x * torch.where(inside, y, 1.0).log(), 0.0)


def divergence(name, t, p, beta):
    m = beta * t + (1 - beta) * p
    if name == "forward_kl" or (name == "scaled_jsd" and beta == 0):
        return (_xlogy(t, t) - _xlogy(t, p)).sum(-1)
    if name == "reverse_kl" or (name == "scaled_jsd" and beta == 1):
        return (_xlogy(p, p) - _xlogy(p, t)).sum(-1)
    if name in ("jsd", "scaled_jsd"):
        jsd = beta * (_xlogy(t, t) - _xlogy(t, m)).sum(-1) + (1 - beta) * (_xlogy(p, p) - _xlogy(p, m)).sum(-1)
        return jsd / (beta * (1 - beta)) if name == "scaled_jsd" else jsd
    if name == "skew_kl":
        return (_xlogy(t, t) - _xlogy(t, m)).sum(-1)
    assert name == "total_variation"
    return 0.5 * (t - p).abs().sum(-1)


def temper(mass, temperature):
    """mass^(1/T), normalised."""
    powered = torch.where(mass > 0, torch.where(mass > 0, mass, 1.0) ** (1 / temperature), 0.0)
    return powered / powered.sum(-1, keepdim=True)


def token_divergence(name, teacher_mass, student_mass, beta, temperature):
    return temperature**2 * divergence(name, temper(teacher_mass, temperature), temper(student_mass, temperature), beta)


def coarse(mass_V, support):
    """Masses of the tokens in `support` and of everything else."""
    inside = torch.zeros(len(mass_V), dtype=torch.bool)
    inside[support] = True
    return torch.cat([mass_V[support], mass_V[~inside].sum().reshape(1)])


def logits(hidden, head, bias=None, logit_scale=1.0, softcap=None):
    z = hidden @ head.T
    z = (z if bias is None else z + bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def distill_loss(
    z_NV,
    labels_N,
    normalizer,
    *,
    pairs=None,
    alpha=0.0,
    weights=None,
    name="forward_kl",
    beta=0.5,
    temperature=1.0,
    z_loss=0.0,
):
    """pairs: per token (teacher masses, function of the student's masses to the same outcomes), or None without a
    teacher."""
    total = 0.0 * z_NV.sum()
    for n in range(len(labels_N)):
        if labels_N[n] == -100:
            continue
        weight = 1.0 if weights is None else float(weights[n])
        p_V = torch.softmax(z_NV[n], 0)
        loss = -(1 - alpha) * torch.log_softmax(z_NV[n], 0)[labels_N[n]] + z_loss * torch.logsumexp(z_NV[n], 0) ** 2
        if pairs is not None:
            teacher, reduce_student = pairs[n]
            loss = loss + alpha * token_divergence(name, teacher, reduce_student(p_V), beta, temperature)
        total = total + weight * loss
    return total / normalizer
