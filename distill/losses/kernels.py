"""Triton kernels of the loss over a sparse teacher: a chunk's float32 logits are read twice, their gradient is written
once, in the dtype of the matrix products.

One program serves one row, so nothing leaves it: the support is read and masked out (to -inf, in place), the rest is
reduced to its maximum, its logsumexp and its mean logit, and later every logit's gradient goes to the stash (stash.py).
All that lies between, the divergence on K+1 outcomes, is the torch code of sparse_chunk.py.

Logits are the bare product of hidden states and head; bias, scale and soft-capping happen in registers. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors, without a GPU.

Shape legend: C tokens of a chunk, V vocabulary, K support (padded to a power of two inside).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.losses.divergence import LOG_ZERO
from distill.losses.stash import GradStash

STATS_SIZE, STATS_WARPS = 1024, 4  # columns that a program looks at at a time
GRAD_SIZE, GRAD_WARPS = 2048, 4


@triton.jit
def logit(x, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """softcap(scale * (x + bias)); a masked x of -inf stays -inf."""
    z = x
    if HAS_BIAS:
        z += bias
    z *= scale
    if HAS_SOFTCAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1): right at both ends, where exp overflows to inf or vanishes
        z = tl.where(x == float("-inf"), float("-inf"), softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1)))
    return z


@triton.jit
def stash_offset(row, column, rows, width: tl.constexpr, vocab: tl.constexpr):
    """Where the gradient of (row, column) lies: slices of `width` columns one behind the other, each row-major."""
    first = (column // width) * width
    return first.to(tl.int64) * rows + row * tl.minimum(width, vocab - first) + (column - first)


@triton.jit
def rest_stats_kernel(
    logits, bias, ids, labels, support, label_logit, top, log_rest, mean, scale, softcap, stride, K,
    vocab: tl.constexpr, K2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ZERO: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    label_bias = tl.load(bias + label) if HAS_BIAS else 0.0
    label_z = logit(tl.load(logits + label), label_bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(label_logit + row, label_z)
    if K2 > 0:
        entry = tl.arange(0, K2)
        token = tl.load(ids + row * K + entry, mask=entry < K, other=-1)
        real = token >= 0
        entry_x = tl.load(logits + token, mask=real, other=0.0)
        entry_bias = tl.load(bias + token, mask=real, other=0.0) if HAS_BIAS else 0.0
        entry_z = logit(entry_x, entry_bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        tl.store(support + row * K + entry, tl.where(real, entry_z, ZERO), mask=entry < K)
        tl.debug_barrier()  # every read of the row's entries is over before the first is overwritten
        tl.store(logits + token, tl.full([K2], float("-inf"), tl.float32), mask=real)
        tl.debug_barrier()
    high = tl.full([], ZERO, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    weighted = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab, SIZE):
        column = start + tl.arange(0, SIZE)
        inside = column < vocab
        x = tl.load(logits + column, mask=inside, other=float("-inf"))
        column_bias = tl.load(bias + column, mask=inside, other=0.0) if HAS_BIAS else 0.0
        z = logit(x, column_bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        higher = tl.maximum(high, tl.max(z, 0))
        shrink = tl.exp(high - higher)
        e = tl.exp(z - higher)
        total = total * shrink + e
        weighted = weighted * shrink + tl.where(e > 0, e * z, 0.0)
        high = higher
    mass = tl.sum(total, 0)
    empty = high <= ZERO
    tl.store(top + row, high)
    tl.store(log_rest + row, tl.where(empty, ZERO, high + tl.log(mass)))
    tl.store(mean + row, tl.where(empty, 0.0, tl.sum(weighted, 0) / tl.where(empty, 1.0, mass)))


@triton.jit
def rest_grad_kernel(
    logits, bias, ids, labels, support, support_grad, label_logit, label_grad, log_rest, rest_grad, stash,
    scale, softcap, stride, K, stash_rows, first_row, width: tl.constexpr, vocab: tl.constexpr, K2: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, padded: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)  # the rows read last are still in cache
    place = first_row + row
    logits += row * stride
    log_mass = tl.load(log_rest + row)
    slope = tl.load(rest_grad + row) * scale
    for start in range(0, vocab, SIZE):
        column = start + tl.arange(0, SIZE)
        inside = column < vocab
        x = tl.load(logits + column, mask=inside, other=float("-inf"))
        column_bias = tl.load(bias + column, mask=inside, other=0.0) if HAS_BIAS else 0.0
        z = logit(x, column_bias, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        grad = tl.where(z > float("-inf"), tl.exp(z - log_mass), 0.0) * slope
        if HAS_SOFTCAP:
            grad *= tl.where(z > float("-inf"), 1 - z * z / (softcap * softcap), 0.0)
        where = stash_offset(place, column, stash_rows, width, padded)
        tl.store(stash + where, grad.to(stash.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the label and the support are written over what the loop wrote
    label = tl.load(labels + row)
    grad = tl.load(label_grad + row) * scale
    if HAS_SOFTCAP:
        z = tl.load(label_logit + row)
        grad *= 1 - z * z / (softcap * softcap)
    tl.store(stash + stash_offset(place, label, stash_rows, width, padded), grad.to(stash.dtype.element_ty))
    if K2 > 0:
        tl.debug_barrier()
        entry = tl.arange(0, K2)
        inside = entry < K
        token = tl.load(ids + row * K + entry, mask=inside, other=-1)
        grads = tl.load(support_grad + row * K + entry, mask=inside, other=0.0) * scale
        if HAS_SOFTCAP:
            zs = tl.load(support + row * K + entry, mask=inside, other=0.0)
            grads *= tl.where(token >= 0, 1 - zs * zs / (softcap * softcap), 0.0)
        where = stash_offset(place, token, stash_rows, width, padded)
        tl.store(stash + where, grads.to(stash.dtype.element_ty), mask=token >= 0)


@triton.jit
def scale_kernel(values, factor, count, SIZE: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = index < count
        x = tl.load(values + index, mask=inside).to(tl.float32)
        tl.store(values + index, (x * by).to(values.dtype.element_ty), mask=inside)


def rest_stats(logits_CV: Tensor, ids_CK: Tensor, labels_C: Tensor, head) -> tuple[Tensor, ...]:
    """(support [C, K], label logit, top, logsumexp and mean of the rest, each [C, 1]) in float32.

    ids_CK: int64, -1 where padded. The support's entries of logits_CV become -inf. A rest of nothing has LOG_ZERO as
    its top and logsumexp and 0 as its mean.
    """
    rows, width = ids_CK.shape
    support_CK = torch.empty(rows, width, dtype=torch.float32, device=logits_CV.device)
    stats = [torch.empty(rows, 1, dtype=torch.float32, device=logits_CV.device) for _ in range(4)]
    rest_stats_kernel[(rows,)](
        logits_CV, head.bias_V, ids_CK, labels_C, support_CK, *stats, head.logit_scale, head.softcap or 0.0,
        logits_CV.stride(0), width, vocab=logits_CV.shape[1], K2=_padded(width), ZERO=LOG_ZERO,
        SIZE=_size(logits_CV, STATS_SIZE), num_warps=STATS_WARPS, **_flags(head),
    )  # fmt: skip
    return support_CK, *stats


def write_rest_grad(
    logits_CV: Tensor, ids_CK: Tensor, labels_C: Tensor, support_CK: Tensor, support_grad_CK: Tensor,
    label_logit_C1: Tensor, label_grad_C1: Tensor, log_rest_C1: Tensor, rest_grad_C1: Tensor, head, stash: GradStash,
    first_row: int,
) -> None:  # fmt: skip
    """Writes dL/d(hidden @ head.T) of logits that rest_stats left to the rows of the stash from first_row on:
    rest_grad times the distribution in the rest, except at the label (label_grad) and on the support (support_grad,
    which wins where both are one token)."""
    rows, width = ids_CK.shape
    rest_grad_kernel[(rows,)](
        logits_CV, head.bias_V, ids_CK, labels_C, support_CK, support_grad_CK.contiguous(), label_logit_C1,
        label_grad_C1.contiguous(), log_rest_C1, rest_grad_C1.contiguous(), stash.grads, head.logit_scale,
        head.softcap or 0.0, logits_CV.stride(0), width, stash.rows, first_row, width=stash.width,
        vocab=logits_CV.shape[1], K2=_padded(width), padded=stash.padded, num_warps=GRAD_WARPS,
        SIZE=min(GRAD_SIZE, stash.block), **_flags(head),
    )  # fmt: skip


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor (a scalar on the device), without touching the memory when the factor is 1."""
    size = 8192
    scale_kernel[(triton.cdiv(values.numel(), size),)](values, factor, values.numel(), SIZE=size, num_warps=8)


def _padded(width: int) -> int:
    return triton.next_power_of_2(width) if width else 0


def _flags(head) -> dict:
    return {"HAS_BIAS": head.bias_V is not None, "HAS_SOFTCAP": head.softcap is not None}


def _size(logits_CV: Tensor, most: int) -> int:
    return min(most, triton.next_power_of_2(logits_CV.shape[1]))
