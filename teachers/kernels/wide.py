"""Draws of rows whose nucleus is larger than the candidates, on the GPU, without sorting the vocabulary.

The nucleus keeps every token of at least the logit t, the least v for which the mass of the logits above v is below
top_p. Three passes, each spread over the vocabulary, cut the interval that holds t to a 512th; the few logits inside it
are collected, and t is found among them by bisection. Rows with top_k whose k-th candidate may be tied with tokens
beyond the candidates, and rows with more logits in the interval than the list holds, go one by one through a slower
kernel. Rows that are not pending leave every kernel at once.

Shape legend: A rows, V vocabulary, K candidates, C chunks of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers.kernels.law import from_key, key, pick, uniform, weight

PASSES = 3
LISTED = 2048  # logits of a row that can be collected


@triton.jit
def _thresholds(low, high, i):
    """Eight of them in (low, high]; the last is high itself."""
    return tl.where(i == 7, high, low + (high - low) * ((i + 1).to(tl.float32) * 0.125))


@triton.jit
def _bound(drawable, top_p, row, C, C2: tl.constexpr):
    c = tl.arange(0, C2)
    total = tl.sum(tl.load(drawable + row * C + c, mask=c < C, other=0.0), 0)
    return tl.maximum(top_p.to(tl.float64) * total, 1e-300), total  # top_p 0 still leaves the most likely token


@triton.jit
def _bracket(brackets, partial, bound, row, C, C2: tl.constexpr):
    """The interval (low, high] after a pass over the interval of row `brackets`, and the mass above high.

    Invariant: mass above low >= bound > mass above high.
    """
    c, i = tl.arange(0, C2), tl.arange(0, 8)
    low, high = tl.load(brackets + 3 * row), tl.load(brackets + 3 * row + 1)
    threshold = _thresholds(low.to(tl.float32), high.to(tl.float32), i)
    part = tl.load(partial + (row * C + c[:, None]) * 8 + i[None, :], mask=(c < C)[:, None], other=0.0)
    mass = tl.sum(part, 0)
    enough = mass < bound
    new_high = tl.min(tl.where(enough, threshold, high.to(tl.float32)), 0)
    above = tl.max(tl.where(enough, mass, 0.0), 0)
    new_low = tl.max(tl.where((enough == 0) & (threshold < new_high), threshold, low.to(tl.float32)), 0)
    return new_low, new_high, above


@triton.jit
def _search(
    logits, values, drawable, temperatures, top_ps, pending, before, after, partial_before, partial, stride, V, C,
    FIRST: tl.constexpr, K: tl.constexpr, C2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top_p = tl.load(top_ps + row)
    if (tl.load(pending + row) != 1) | (top_p >= 1):
        return
    best, temperature = tl.load(values + row * K), tl.load(temperatures + row)
    bound, total = _bound(drawable, top_p, row, C, C2)
    if FIRST:
        # Tokens lighter than (1 - top_p) total / V weigh less than (1 - top_p) total together: t is not among them.
        lightest = tl.log((1 - top_p) * total.to(tl.float32) / V)
        low, high = best + temperature * (lightest - 0.01), tl.load(values + row * K + K - 1)
        above = tl.full([], 0.0, tl.float64)
    else:
        low, high, above = _bracket(before, partial_before, bound, row, C, C2)
    if chunk == 0:
        tl.store(after + 3 * row, low.to(tl.float64))
        tl.store(after + 3 * row + 1, high.to(tl.float64))
        tl.store(after + 3 * row + 2, above)
    i = tl.arange(0, 8)
    threshold = _thresholds(low, high, i)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf"))
    mass = tl.where(v < V, weight(logit, best, temperature), 0.0).to(tl.float64)
    sums = tl.sum(tl.where(logit[None, :] > threshold[:, None], mass[None, :], 0.0), 1)
    tl.store(partial + (row * C + chunk) * 8 + i, sums)


@triton.jit
def _collect(
    logits, values, drawable, top_ps, pending, before, after, partial, listed, counts, stride, V, C, K: tl.constexpr,
    C2: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top_p = tl.load(top_ps + row)
    if (tl.load(pending + row) != 1) | (top_p >= 1):
        return
    bound, _ = _bound(drawable, top_p, row, C, C2)
    low, high, above = _bracket(before, partial, bound, row, C, C2)
    if chunk == 0:
        tl.store(after + 3 * row, low.to(tl.float64))
        tl.store(after + 3 * row + 1, high.to(tl.float64))
        tl.store(after + 3 * row + 2, above)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf"))
    inside = (v < V) & (logit > low) & (logit <= high)
    count = tl.sum(inside.to(tl.int32), 0)
    if count > 0:
        start = tl.atomic_add(counts + row, count)
        to = start + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(listed + row * LISTED + to, logit, mask=inside & (to < LISTED))


@triton.jit
def _threshold(
    values, drawable, temperatures, top_ps, pending, bracket, listed, counts, least, C, K: tl.constexpr,
    C2: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(pending + row) != 1:
        return
    top_p, temperature = tl.load(top_ps + row), tl.load(temperatures + row)
    if top_p >= 1:
        tl.store(least + row, float("-inf"))
        return
    count, best = tl.load(counts + row), tl.load(values + row * K)
    if count > LISTED:
        tl.store(pending + row, 2)
        return
    bound, _ = _bound(drawable, top_p, row, C, C2)
    above = tl.load(bracket + 3 * row + 2)
    i = tl.arange(0, LISTED)
    logit = tl.load(listed + row * LISTED + i, mask=i < count, other=float("-inf"))
    mass = tl.where(i < count, weight(logit, best, temperature), 0.0).to(tl.float64)
    order = key(logit).to(tl.int64)
    low = key(tl.load(bracket + 3 * row).to(tl.float32)).to(tl.int64)
    high = key(tl.load(bracket + 3 * row + 1).to(tl.float32)).to(tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        if above + tl.sum(tl.where(order > middle, mass, 0.0), 0) < bound:
            high = middle
        else:
            low = middle
    tl.store(least + row, from_key(high))


@triton.jit
def _kept(
    logits, values, temperatures, min_ps, pending, least, kept_sums, stride, V, C, K: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(pending + row) != 1:
        return
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(logits + row * stride + v, mask=v < V, other=float("-inf"))
    mass = weight(logit, tl.load(values + row * K), tl.load(temperatures + row))
    kept = (v < V) & (logit >= tl.load(least + row)) & (mass >= tl.load(min_ps + row))
    tl.store(kept_sums + row * C + chunk, tl.sum(tl.where(kept, mass, 0.0).to(tl.float64), 0))


@triton.jit
def _finish(
    logits, values, seeds, drawn, temperatures, min_ps, tokens, pending, least, kept_sums, stride, V, C,
    K: tl.constexpr, C2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(pending + row) != 1:
        return
    c = tl.arange(0, C2)
    sums = tl.load(kept_sums + row * C + c, mask=c < C, other=0.0)
    target = uniform(seeds, drawn, row) * tl.sum(sums, 0)
    best, temperature = tl.load(values + row * K), tl.load(temperatures + row)
    limit, min_p = tl.load(least + row), tl.load(min_ps + row)
    token = pick(logits, sums, row, stride, V, best, temperature, limit, min_p, target, C2, CHUNK)
    tl.store(tokens + row, token)


@triton.jit
def _one_by_one(
    logits, values, drawable, seeds, drawn, temperatures, top_ps, top_ks, min_ps, tokens, pending, scratch, stride, V,
    C, K: tl.constexpr, C2: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(pending + row) != 2:
        return
    c, b = tl.arange(0, C2), tl.arange(0, BLOCK)
    temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
    top_k, min_p = tl.load(top_ks + row), tl.load(min_ps + row)
    best = tl.load(values + row * K)
    total = tl.sum(tl.load(drawable + row * C + c, mask=c < C, other=0.0), 0)
    floor = tl.full([], -2139095041, tl.int64)  # the key of -inf: no logit has less
    if (top_k > 0) & (top_k < V):
        limit = tl.load(values + row * K + top_k - 1)
        floor = key(limit).to(tl.int64)
        mass = tl.zeros([BLOCK], tl.float64)
        for start in range(0, V, BLOCK):
            logit = tl.load(logits + row * stride + start + b, mask=start + b < V, other=float("-inf"))
            kept = (start + b < V) & (logit >= limit)
            mass += tl.where(kept, weight(logit, best, temperature), 0.0).to(tl.float64)
        total = tl.sum(mass, 0)
    least = floor
    if top_p < 1:
        # The least key t with mass{key > t} < top_p * total: every token of at least that key stays. Seven thresholds
        # a pass. Invariant: it lies in (low, high].
        i = tl.arange(0, 8)
        low, high = floor - 1, key(tl.load(values + row * K + K - 1)).to(tl.int64)
        while high - low > 1:
            step = (high - low + 7) // 8
            threshold = tl.minimum(low + step * (i + 1), high)
            mass = tl.zeros([8, BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                logit = tl.load(logits + row * stride + start + b, mask=start + b < V, other=float("-inf"))
                mass_B = tl.where(start + b < V, weight(logit, best, temperature), 0.0)
                above = key(logit)[None, :].to(tl.int64) > threshold[:, None]
                mass += tl.where(above, mass_B[None, :], 0.0)
            enough = tl.sum(mass.to(tl.float64), 1) < top_p * total
            high = tl.minimum(high, tl.min(tl.where(enough, threshold, high), 0))
            low = tl.maximum(low, tl.max(tl.where((threshold < high) & (enough == 0), threshold, low), 0))
        least = high
    least_logit = from_key(least)
    for chunk in range(0, C):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        logit = tl.load(logits + row * stride + at, mask=at < V, other=float("-inf"))
        mass_N = weight(logit, best, temperature)
        kept = (at < V) & (logit >= least_logit) & (mass_N >= min_p)
        tl.store(scratch + row * C + chunk, tl.sum(tl.where(kept, mass_N, 0.0).to(tl.float64), 0))
    tl.debug_barrier()
    sums = tl.load(scratch + row * C + c, mask=c < C, other=0.0)
    target = uniform(seeds, drawn, row) * tl.sum(sums, 0)
    token = pick(logits, sums, row, stride, V, best, temperature, least_logit, min_p, target, C2, CHUNK)
    tl.store(tokens + row, token)


def draw(
    logits_AV: Tensor,
    values_AK: Tensor,
    drawable_AC: Tensor,
    params: tuple,
    tokens_A: Tensor,
    pending_A: Tensor,
    chunk: int,
) -> None:
    """Draws the tokens of rows whose pending_A is 1 (any row without top_k) or 2.

    drawable_AC: mass of each chunk at the row's temperature. params: seeds, drawn, temperature, top_p, top_k, min_p.
    """  # fmt: skip
    rows, vocab = logits_AV.shape
    seeds_A, drawn_A, temperature_A, top_p_A, _, min_p_A = params
    chunks, stride = drawable_AC.shape[1], logits_AV.stride(0)
    new = lambda *shape, dtype=torch.float64: torch.empty(*shape, dtype=dtype, device=logits_AV.device)  # noqa: E731
    shape = {"K": values_AK.shape[1], "C2": triton.next_power_of_2(chunks)}
    brackets, partial = new(PASSES + 1, rows, 3), new(PASSES, rows, chunks, 8)
    listed, least_A = new(rows, LISTED, dtype=torch.float32), new(rows, dtype=torch.float32)
    counts_A = torch.zeros(rows, dtype=torch.int32, device=logits_AV.device)
    kept_AC = new(rows, chunks)
    for i in range(PASSES):
        _search[(rows, chunks)](
            logits_AV, values_AK, drawable_AC, temperature_A, top_p_A, pending_A, brackets[max(0, i - 1)], brackets[i],
            partial[max(0, i - 1)], partial[i], stride, vocab, chunks, FIRST=i == 0, **shape, CHUNK=chunk, num_warps=4,
        )  # fmt: skip
    _collect[(rows, chunks)](
        logits_AV, values_AK, drawable_AC, top_p_A, pending_A, brackets[PASSES - 1], brackets[PASSES],
        partial[PASSES - 1], listed, counts_A, stride, vocab, chunks, **shape, CHUNK=chunk, LISTED=LISTED, num_warps=4,
    )  # fmt: skip
    _threshold[(rows,)](
        values_AK, drawable_AC, temperature_A, top_p_A, pending_A, brackets[PASSES], listed, counts_A, least_A, chunks,
        **shape, LISTED=LISTED, num_warps=4,
    )  # fmt: skip
    _kept[(rows, chunks)](
        logits_AV, values_AK, temperature_A, min_p_A, pending_A, least_A, kept_AC, stride, vocab, chunks, K=shape["K"],
        CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    _finish[(rows,)](
        logits_AV, values_AK, seeds_A, drawn_A, temperature_A, min_p_A, tokens_A, pending_A, least_A, kept_AC, stride,
        vocab, chunks, **shape, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    _one_by_one[(rows,)](
        logits_AV, values_AK, drawable_AC, *params, tokens_A, pending_A, kept_AC, stride, vocab, chunks, **shape,
        CHUNK=chunk, BLOCK=4096, num_warps=16,
    )  # fmt: skip
