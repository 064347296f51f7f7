"""The K most likely tokens of every row, and the mass of all others, from one read of the logits.

Columns are ids w, w + W, w + 2 W, ...: the columns with the K largest maxima hold the K most likely tokens. A first
kernel leaves each column's maximum (and its mass relative to it). The second finds the K-th largest maximum t by
bisection, lists the columns and then the entries that reach it (most often little more than K), and sorts these alone.
Columns below t lie outside as a whole; in the others, what was not chosen. So the mass outside is a sum of outside
terms, and a tail of 1e-12 keeps its digits. Rows with so many ties that a list would overflow, and all rows where they
are few, take a kernel that sorts every maximum.

Shape legend: A rows, V vocabulary, K candidates, W columns, C columns of the list, N entries of the list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers.kernels.law import from_key, key, weight

DEPTH = 32  # entries of a column
FEW = 256  # rows for which one kernel after the other would take longer than a sort
_LOWEST = tl.constexpr(-2139095041)  # the key of -inf


@triton.jit
def _columns(logits, maxima, masses, stride, V, W, DEPTH: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    best = tl.load(logits + row * stride + w, mask=w < W, other=0.0)
    mass = tl.full([BLOCK], 1.0, tl.float32)
    for depth in tl.static_range(1, DEPTH):
        at = depth * W + w
        inside = (w < W) & (at < V)
        logit = tl.load(logits + row * stride + at, mask=inside, other=float("-inf"))
        higher = tl.maximum(best, logit)
        if MASS:
            mass = mass * weight(best, higher, 1.0) + tl.where(inside, weight(logit, higher, 1.0), 0.0)
        best = higher
    tl.store(maxima + row * W + w, best, mask=w < W)
    if MASS:
        tl.store(masses + row * W + w, mass, mask=w < W)


@triton.jit
def _packed(order, at):
    """A logit's key and its place in one integer: equal logits come in order of id, and no two entries are equal."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)


@triton.jit
def _keep(top, values, ids, row, K: tl.constexpr):
    k = tl.arange(0, K)
    value = from_key(top >> 32)
    tl.store(values + row * K + k, value)
    tl.store(ids + row * K + k, 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32))
    return value


@triton.jit
def _select(
    logits, maxima, masses, columns, entries, values, ids, outside, ties, slow, stride, V, W, W2: tl.constexpr,
    K: tl.constexpr, DEPTH: tl.constexpr, C: tl.constexpr, N: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, W2)
    maximum = tl.load(maxima + row * W + w, mask=w < W, other=float("-inf"))
    order = key(maximum)
    # Of K groups of columns each holds one that reaches the least of their K maxima: the K-th largest does, too.
    low = tl.min(tl.max(tl.reshape(order, [W2 // K, K]), 0), 0).to(tl.int64) - 1
    low, high = tl.maximum(low, tl.full([], _LOWEST - 1, tl.int64)), tl.max(order, 0).to(tl.int64)
    while high - low > 1:  # K or more maxima lie above low, fewer above high
        middle = low + (high - low) // 2
        if tl.sum((order > middle.to(tl.int32)).to(tl.int32), 0) >= K:
            low = middle
        else:
            high = middle
    least = high.to(tl.int32)
    chosen = (order >= least) & (w < W)
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(slow + row, (count > C).to(tl.int32))
    if count > C:
        return
    tl.store(columns + row * C + tl.cumsum(chosen.to(tl.int32), 0) - 1, w, mask=chosen)
    tl.debug_barrier()
    c = tl.arange(0, C)
    column = tl.load(columns + row * C + c, mask=c < count, other=0)
    at = column[:, None] + tl.arange(0, DEPTH)[None, :] * W
    inside = (c < count)[:, None] & (at < V)
    logit = tl.load(logits + row * stride + at, mask=inside, other=float("-inf"))
    entry = key(logit)
    reach = inside & (entry >= least)
    flat = tl.reshape(reach.to(tl.int32), [C * DEPTH])
    found = tl.sum(flat, 0)
    tl.store(slow + row, (found > N).to(tl.int32))
    if found > N:
        return
    place = tl.reshape(tl.cumsum(flat, 0) - 1, [C, DEPTH])
    tl.store(entries + row * N + place, _packed(entry, at), mask=reach)
    tl.debug_barrier()
    n = tl.arange(0, N)
    nothing = (tl.full([N], _LOWEST, tl.int64) << 32) | 0x7FFFFFFF
    top = tl.topk(tl.where(n < found, tl.load(entries + row * N + n, mask=n < found, other=0), nothing), K)
    value = _keep(top, values, ids, row, K)
    if MASS:
        best = tl.max(maximum, 0)
        mass = tl.load(masses + row * W + w, mask=w < W, other=0.0)
        whole = (order < least) & (w < W)
        beyond = tl.sum(tl.where(whole, mass * weight(maximum, best, 1.0), 0.0).to(tl.float64), 0)
        left = inside & (_packed(entry, at) < tl.min(top, 0))
        beyond += tl.sum(tl.sum(tl.where(left, weight(logit, best, 1.0), 0.0).to(tl.float64), 1), 0)
        tl.store(outside + row, beyond)
        tl.store(ties + row, tl.sum((value == tl.min(value, 0)).to(tl.int32), 0))  # ties beyond are in the mass


@triton.jit
def _sorted(
    logits, maxima, masses, values, ids, outside, ties, slow, stride, V, W, W2: tl.constexpr, K: tl.constexpr,
    DEPTH: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slow + row) == 0:
        return
    w = tl.arange(0, W2)
    maximum = tl.load(maxima + row * W + w, mask=w < W, other=float("-inf"))
    order = _packed(key(maximum), w)
    top = tl.topk(order, K)
    whole = (order < tl.min(top, 0)) & (w < W)
    column = 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32)
    at = column[:, None] + tl.arange(0, DEPTH)[None, :] * W
    logit = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf"))
    inside = _packed(key(logit), at)
    top = tl.topk(tl.reshape(inside, [K * DEPTH]), K)
    value = _keep(top, values, ids, row, K)
    if MASS:
        best = tl.max(maximum, 0)
        mass = tl.load(masses + row * W + w, mask=w < W, other=0.0)
        beyond = tl.sum(tl.where(whole, mass * weight(maximum, best, 1.0), 0.0).to(tl.float64), 0)
        left = (inside < tl.min(top, 0)) & (at < V)
        beyond += tl.sum(tl.sum(tl.where(left, weight(logit, best, 1.0), 0.0).to(tl.float64), 1), 0)
        tl.store(outside + row, beyond)
        tl.store(ties + row, tl.sum((value == tl.min(value, 0)).to(tl.int32), 0))


def columns_of(vocab: int, k: int) -> int | None:
    """How many columns the search over such a vocabulary has; None where it is too small for one."""
    width = triton.cdiv(triton.cdiv(vocab, DEPTH), 16) * 16  # a multiple of 16 numbers: wide reads
    return None if width < 2 * k or vocab <= DEPTH * 16 else width


def search(logits_AV: Tensor, k: int, width: int, with_rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest logits of each row, largest first, and their ids [A, K]; with_rest: the mass of all others (float64
    [A], relative to the most likely token) and how many candidates tie with the last of them."""
    (rows, vocab), stride = logits_AV.shape, logits_AV.stride(0)
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=logits_AV.device)  # noqa: E731
    maxima_AW, masses_AW = new(rows, width), new(rows, width if with_rest else 0)
    values_AK, ids_AK = new(rows, k), new(rows, k, dtype=torch.int32)
    outside_A, ties_A = new(rows, dtype=torch.float64), new(rows, dtype=torch.int32)
    slow_A = torch.ones(rows, dtype=torch.int32, device=logits_AV.device)
    columns_AC, entries_AN = new(rows, 2 * k, dtype=torch.int32), new(rows, 4 * k, dtype=torch.int64)
    of = {"DEPTH": DEPTH, "MASS": with_rest}
    _columns[(rows, triton.cdiv(width, 512))](
        logits_AV, maxima_AW, masses_AW, stride, vocab, width, **of, BLOCK=512, num_warps=4
    )
    of |= {"W2": triton.next_power_of_2(width), "K": k}
    if rows > FEW:
        _select[(rows,)](
            logits_AV, maxima_AW, masses_AW, columns_AC, entries_AN, values_AK, ids_AK, outside_A, ties_A, slow_A,
            stride, vocab, width, **of, C=2 * k, N=4 * k, num_warps=4 if k <= 64 else 8,
        )  # fmt: skip
    _sorted[(rows,)](
        logits_AV, maxima_AW, masses_AW, values_AK, ids_AK, outside_A, ties_A, slow_A, stride, vocab, width, **of,
        num_warps=8,
    )  # fmt: skip
    return values_AK, ids_AK, outside_A, ties_A
