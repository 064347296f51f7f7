"""Triton kernels of the loss against an online teacher: both float32 logit rows are read twice (three times for
divergences whose gradient needs a sum over the vocabulary first), the gradient is written once (stash.py).

A row is one program. Formulas and names are those of divergence.py; the bare logits are turned into real ones in
registers (kernels.logit).

Shape legend: C tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.kernels import logit, stash_offset
from distill.losses.stash import GradStash, stash_block

LSE_SIZE, LSE_WARPS = 4096, 8  # columns that a program looks at at a time
GRAD_SIZE, GRAD_WARPS = 4096, 4
RULES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "total_variation": 4}
STATS = 7  # logsumexp of student and teacher at 1 and at T, label logit, the student's best, its logit at the teacher's


@triton.jit
def log1p(u):
    return tl.where(tl.abs(u) < 1e-2, u * (1 - u * (0.5 - u * (0.33333333 - 0.25 * u))), tl.log(1 + u))


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 1e-2, x * (1 + x * (0.5 + x * (0.16666667 + x * 0.041666667))), tl.exp(x) - 1)


@triton.jit
def terms(logp, logt, beta, RULE: tl.constexpr):
    """(summand of D, w) of divergence.py for each outcome."""
    p, t = tl.exp(logp), tl.exp(logt)
    x = logt - logp
    if RULE == 0:
        return t * x, -t
    if RULE == 1:
        return -p * x, -p * x
    if RULE == 4:
        gap = p - t
        gap = tl.where(tl.abs(gap) <= t * 7.62939453125e-06, 0.0, gap)  # 64 roundings of float32
        sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
        return 0.5 * tl.abs(gap), 0.5 * sign * p
    from_p = log1p(beta * expm1(tl.minimum(x, 20.0)))
    from_t = log1p((1 - beta) * expm1(tl.minimum(-x, 20.0)))
    log_m_p = tl.where(x < 20.0, from_p, x + from_t)
    log_m_t = tl.where(x > -20.0, from_t, from_p - x)
    if RULE == 2:
        w = -(1 - beta) * p * log_m_p
        return w - beta * t * log_m_t, w
    return -t * log_m_t, -(1 - beta) * t * tl.exp(-log_m_p)


@triton.jit
def lse_kernel(
    student, teacher, row_s, row_t, bias_s, bias_t, labels, out, scale_s, scale_t, cap_s, cap_t, inverse_t,
    vocab: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP_S: tl.constexpr,
    HAS_CAP_T: tl.constexpr, TEMPERED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * row_s
    teacher += row * row_t
    high_s = tl.full([], -1e30, tl.float32)
    high_t = tl.full([], -1e30, tl.float32)
    best_t = tl.zeros([], tl.int32)
    sum_s = tl.zeros([SIZE], tl.float32)
    sum_t = tl.zeros([SIZE], tl.float32)
    warm_s = tl.zeros([SIZE], tl.float32)
    warm_t = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab, SIZE):
        column = start + tl.arange(0, SIZE)
        inside = column < vocab
        x = tl.load(student + column, mask=inside, other=float("-inf"))
        b = tl.load(bias_s + column, mask=inside, other=0.0) if HAS_BIAS_S else 0.0
        zs = logit(x, b, scale_s, cap_s, HAS_BIAS_S, HAS_CAP_S)
        x = tl.load(teacher + column, mask=inside, other=float("-inf"))
        b = tl.load(bias_t + column, mask=inside, other=0.0) if HAS_BIAS_T else 0.0
        zt = logit(x, b, scale_t, cap_t, HAS_BIAS_T, HAS_CAP_T)
        higher = tl.maximum(high_s, tl.max(zs, 0))
        sum_s = sum_s * tl.exp(high_s - higher) + tl.exp(zs - higher)
        if TEMPERED:
            warm_s = warm_s * tl.exp((high_s - higher) * inverse_t) + tl.exp((zs - higher) * inverse_t)
        high_s = higher
        top, where = tl.max(zt, 0, return_indices=True)
        best_t = tl.where(top > high_t, start + where, best_t)
        higher = tl.maximum(high_t, top)
        sum_t = sum_t * tl.exp(high_t - higher) + tl.exp(zt - higher)
        if TEMPERED:
            warm_t = warm_t * tl.exp((high_t - higher) * inverse_t) + tl.exp((zt - higher) * inverse_t)
        high_t = higher
    out += row * 7
    tl.store(out, high_s + tl.log(tl.sum(sum_s, 0)))
    tl.store(out + 1, high_t + tl.log(tl.sum(sum_t, 0)))
    if TEMPERED:
        tl.store(out + 2, high_s * inverse_t + tl.log(tl.sum(warm_s, 0)))
        tl.store(out + 3, high_t * inverse_t + tl.log(tl.sum(warm_t, 0)))
    label = tl.load(labels + row)
    b = tl.load(bias_s + label) if HAS_BIAS_S else 0.0
    tl.store(out + 4, logit(tl.load(student + label), b, scale_s, cap_s, HAS_BIAS_S, HAS_CAP_S))
    tl.store(out + 5, high_s)
    b = tl.load(bias_s + best_t) if HAS_BIAS_S else 0.0
    tl.store(out + 6, logit(tl.load(student + best_t), b, scale_s, cap_s, HAS_BIAS_S, HAS_CAP_S))


@triton.jit
def grad_kernel(
    student, teacher, row_s, row_t, bias_s, bias_t, labels, stats, out, weight_sum, coefficients, stash, stash_rows,
    first_row, scale_s, scale_t, cap_s, cap_t, inverse_t, beta, width: tl.constexpr, padded: tl.constexpr,
    vocab: tl.constexpr, RULE: tl.constexpr, WRITE: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr,
    HAS_CAP_S: tl.constexpr, HAS_CAP_T: tl.constexpr, TEMPERED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out: divergence, forward KL at temperature 1, E_p[z], sum of w. WRITE: the gradient too, by weight_sum."""
    row = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)  # the rows read last are still in cache
    place = first_row + row
    student += row * row_s
    teacher += row * row_t
    stats += row * 7
    lse_s, lse_t = tl.load(stats), tl.load(stats + 1)
    warm_s, warm_t = lse_s, lse_t
    if TEMPERED:
        warm_s, warm_t = tl.load(stats + 2), tl.load(stats + 3)
    if WRITE:
        w_sum = tl.load(weight_sum + row)
        by_teacher = tl.load(coefficients + row * 3) / inverse_t
        by_p = tl.load(coefficients + row * 3 + 1)
        by_label = tl.load(coefficients + row * 3 + 2)
        label = tl.load(labels + row)
    value = tl.zeros([SIZE], tl.float32)
    kl = tl.zeros([SIZE], tl.float32)
    mean = tl.zeros([SIZE], tl.float32)
    weights = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab, SIZE):
        column = start + tl.arange(0, SIZE)
        inside = column < vocab
        x = tl.load(student + column, mask=inside, other=0.0)
        b = tl.load(bias_s + column, mask=inside, other=0.0) if HAS_BIAS_S else 0.0
        zs = logit(x, b, scale_s, cap_s, HAS_BIAS_S, HAS_CAP_S)
        x = tl.load(teacher + column, mask=inside, other=0.0)
        b = tl.load(bias_t + column, mask=inside, other=0.0) if HAS_BIAS_T else 0.0
        zt = logit(x, b, scale_t, cap_t, HAS_BIAS_T, HAS_CAP_T)
        logp = zs - lse_s
        p = tl.exp(logp)
        kl_term = tl.exp(zt - lse_t) * (zt - lse_t - logp)
        kl += tl.where(inside, kl_term, 0.0)
        mean += tl.where(inside, p * zs, 0.0)
        if TEMPERED:
            log_student = zs * inverse_t - warm_s
            term, w = terms(log_student, zt * inverse_t - warm_t, beta, RULE)
        else:
            log_student = logp
            term, w = terms(logp, zt - lse_t, beta, RULE)
        value += tl.where(inside, term, 0.0)
        weights += tl.where(inside, w, 0.0)
        if WRITE:
            grad = by_teacher * (w - tl.exp(log_student) * w_sum) + by_p * p - tl.where(column == label, by_label, 0.0)
            if HAS_CAP_S:
                grad *= 1 - zs * zs / (cap_s * cap_s)
            where = stash_offset(place, column, stash_rows, width, padded)
            tl.store(stash + where, (grad * scale_s).to(stash.dtype.element_ty), mask=inside)
    out += row * 4
    tl.store(out, tl.sum(value, 0) / (inverse_t * inverse_t))
    tl.store(out + 1, tl.sum(kl, 0))
    tl.store(out + 2, tl.sum(mean, 0))
    tl.store(out + 3, tl.sum(weights, 0))


class DensePair:
    """A chunk's bare logits of student and teacher, and what the two passes over them share."""

    def __init__(
        self, student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, head, teacher_head, rule: str, beta: float,
        temperature: float,
    ):  # fmt: skip
        block = stash_block(student_CV.shape[1])
        self.rows, self.beta, self.rule = len(labels_C), beta, RULES[rule]
        self.matrices = (student_CV, teacher_CV, student_CV.stride(0), teacher_CV.stride(0), head.bias_V,
                         teacher_head.bias_V, labels_C)  # fmt: skip
        self.scalars = (head.logit_scale, teacher_head.logit_scale, head.softcap or 0.0, teacher_head.softcap or 0.0,
                        1 / temperature)  # fmt: skip
        self.flags = {
            "HAS_BIAS_S": head.bias_V is not None,
            "HAS_BIAS_T": teacher_head.bias_V is not None,
            "HAS_CAP_S": head.softcap is not None,
            "HAS_CAP_T": teacher_head.softcap is not None,
            "TEMPERED": temperature != 1.0,
            "vocab": student_CV.shape[1],
        }
        self.grad_flags = {"SIZE": min(GRAD_SIZE, block), "num_warps": GRAD_WARPS}
        self.stats_CX = torch.empty(self.rows, STATS, dtype=torch.float32, device=student_CV.device)
        lse_kernel[(self.rows,)](
            *self.matrices, self.stats_CX, *self.scalars, SIZE=min(LSE_SIZE, block), num_warps=LSE_WARPS, **self.flags
        )

    def sums(self) -> Tensor:
        """[C, 4]: divergence (T^2 included), forward KL at temperature 1, mean student logit, sum of w."""
        return self._pass(None, None, None, 0)

    def write_grad(self, weight_sum_C: Tensor, coefficients_C3: Tensor, stash: GradStash, first_row: int) -> Tensor:
        """`sums`, while rows first_row .. of the stash become dL/d(hidden @ head.T); coefficients: of dD/dz, of p, at
        the label."""
        return self._pass(weight_sum_C.contiguous(), coefficients_C3.contiguous(), stash, first_row)

    def _pass(self, weight_sum_C, coefficients_C3, stash: GradStash | None, first_row: int) -> Tensor:
        out_C4 = torch.empty(self.rows, 4, dtype=torch.float32, device=self.stats_CX.device)
        room, rows, width, padded = (stash.grads, stash.rows, stash.width, stash.padded) if stash else (None, 0, 1, 1)
        grad_kernel[(self.rows,)](
            *self.matrices, self.stats_CX, out_C4, weight_sum_C, coefficients_C3, room, rows, first_row,
            *self.scalars, self.beta, width=width, padded=padded, RULE=self.rule, WRITE=stash is not None,
            **self.flags, **self.grad_flags,
        )  # fmt: skip
        return out_C4
