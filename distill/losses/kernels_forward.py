"""The K+1 forward KL at temperature 1 with its cross-entropy, z-loss and metrics as one small Triton kernel.

It says what sparse_chunk.py says in torch for every divergence; for the usual one, its sixty launches a chunk would
cost a third of what the kernels do that see the vocabulary.

Shape legend: C tokens of a chunk, K support (padded to a power of two inside), M metrics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.divergence import LOG_TINY, LOG_ZERO
from distill.losses.metrics import LossMetrics

COLUMNS = len(LossMetrics.__dataclass_fields__) + 1
assert COLUMNS == 12  # the kernel writes them one by one


@triton.jit
def forward_kl_kernel(
    ids, labels, support, logprobs, tail, label_logit, top, log_rest, mean, scale, alpha, z_loss,
    support_grad, rest_grad, label_grad, out, K, K2: tl.constexpr, ZERO: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, K2)
    at = row * K + entry
    token = tl.load(ids + at, mask=entry < K, other=-1)
    real = token >= 0
    y = tl.where(real, tl.load(support + at, mask=entry < K, other=0.0), ZERO)
    y_rest, y_label, best = tl.load(log_rest + row), tl.load(label_logit + row), tl.load(top + row)
    no_rest = y_rest < ZERO / 2
    high = tl.maximum(tl.max(y, 0), y_rest)
    lse = high + tl.log(tl.sum(tl.exp(y - high), 0) + tl.exp(y_rest - high))
    p, p_rest = tl.exp(y - lse), tl.exp(y_rest - lse)

    taught = tl.where(real, tl.load(logprobs + at, mask=entry < K, other=0.0), ZERO)
    mass = tl.load(tail + row)
    taught_rest = tl.where(mass > 0, tl.log(tl.where(mass > 0, mass, 1.0)), ZERO)
    highest = tl.max(taught, 0)
    peak = tl.maximum(highest, taught_rest)
    total = peak + tl.log(tl.sum(tl.exp(taught - peak), 0) + tl.exp(taught_rest - peak))
    t, t_rest = tl.exp(taught - total), tl.exp(taught_rest - total)
    value = tl.sum(tl.where(t > 0, t * (taught - total - y + lse), 0.0), 0)
    log_p_rest = tl.where(no_rest, TINY, y_rest - lse)
    value += tl.where(t_rest > 0, t_rest * (taught_rest - total - log_p_rest), 0.0)

    weight, share = tl.load(scale + row), tl.load(alpha + row)
    by_kl, by_ce = weight * share, weight * (1 - share)
    by_p = by_ce + 2 * z_loss * lse * weight
    label = tl.load(labels + row)
    grad = by_kl * (p - t) + by_p * p - tl.where(token == label, by_ce, 0.0)
    grad_rest = tl.where(no_rest, 0.0, by_kl * (p_rest - t_rest) + by_p * p_rest)
    tl.store(support_grad + at, grad, mask=entry < K)
    tl.store(rest_grad + row, grad_rest)
    tl.store(label_grad + row, tl.exp(tl.minimum(y_label - y_rest, 0.0)) * grad_rest - by_ce)

    ce = lse - y_label
    best = tl.maximum(best, tl.max(y, 0))
    favourite = tl.max(tl.where(taught == highest, y, ZERO), 0)
    known = tl.where(highest > ZERO / 2, 1.0, 0.0)
    entropy = tl.maximum(lse - tl.sum(p * y, 0) - p_rest * tl.load(mean + row), 0.0)
    out += row * 12
    tl.store(out, 1.0)
    tl.store(out + 1, ce)
    tl.store(out + 2, entropy)
    tl.store(out + 3, tl.where(y_label >= best, 1.0, 0.0))
    tl.store(out + 4, known)
    tl.store(out + 5, value)
    tl.store(out + 6, value)
    tl.store(out + 7, tl.where(favourite >= best, known, 0.0))
    tl.store(out + 8, tl.sum(p, 0) * known)
    tl.store(out + 9, p_rest * known)
    tl.store(out + 10, mass * known)
    tl.store(out + 11, weight * (share * value + (1 - share) * ce + z_loss * lse * lse))


def forward_kl(
    ids_CK: Tensor, labels_C: Tensor, logprobs_CK: Tensor, tail_C: Tensor, scale_C: Tensor, alpha_C: Tensor,
    z_loss: float, stats: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradients of the support [C, K], of the rest [C, 1] and of the label where it is in the rest [C, 1]; metrics
    and loss per token [C, M + 1]). stats: what kernels.rest_stats returns; ids_CK: -1 where padded."""
    support_CK, label_logit_C1, top_C1, log_rest_C1, mean_C1 = stats
    rows, width = ids_CK.shape
    support_grad_CK, rest_grad_C1, label_grad_C1 = (torch.empty_like(x) for x in (support_CK, top_C1, top_C1))
    out_CM = torch.empty(rows, COLUMNS, dtype=torch.float32, device=support_CK.device)
    forward_kl_kernel[(rows,)](
        ids_CK, labels_C, support_CK, logprobs_CK, tail_C, label_logit_C1, top_C1, log_rest_C1, mean_C1, scale_C,
        alpha_C, z_loss, support_grad_CK, rest_grad_C1, label_grad_C1, out_CM, width,
        K2=max(triton.next_power_of_2(width), 2), ZERO=LOG_ZERO, TINY=LOG_TINY, num_warps=1 if width <= 128 else 4,
    )  # fmt: skip
    return support_grad_CK, rest_grad_C1, label_grad_C1, out_CM
