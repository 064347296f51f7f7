"""Draws a token and captures its distribution on the GPU, by the law of distill.sampling, without waiting for the host.

One pass over the logits finds the candidates (the K most likely tokens), one sums everything outside them (without a
draw the first does both); what is left is one small program a row. Rows whose nucleus is larger than the candidates go
through teachers.kernels.wide. Sums are float64; weights are fp32 exponentials of fp32 logits, as in distill.sampling.

The result of a step is one int32 tensor [A, 4 + 2K], so that one copy brings it to the host: token, support size, bits
of the tail mass, bits of the logsumexp, K ids, bits of K log-probabilities.

Shape legend: A rows, V vocabulary, K candidates, C chunks of the vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers.kernels import wide
from teachers.kernels.candidates import columns_of, search
from teachers.kernels.law import pick, uniform, weight

CHUNK = 2048  # vocabulary entries summed by one program
HEADER = 4
LARGEST_K = 256  # candidates of a step at most


def candidates(logits_AV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first, and their ids."""
    width = columns_of(logits_AV.shape[1], k)
    if width is None:
        values_AK, ids_AK = logits_AV.topk(min(k, logits_AV.shape[1]))
        return values_AK, ids_AK.int()
    return search(logits_AV, k, width, with_rest=False)[:2]


@triton.jit
def _sums(
    logits, values, temperatures, outside, ties, drawable, stride, V, C, K, CHUNK: tl.constexpr, DRAW: tl.constexpr,
    CAPTURE: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = c * CHUNK + tl.arange(0, CHUNK)
    inside = v < V
    best, least = tl.load(values + row * K), tl.load(values + row * K + K - 1)
    logit = tl.load(logits + row * stride + v, mask=inside, other=float("-inf"))
    if CAPTURE:
        below = inside & (logit < least)
        mass = tl.sum(tl.where(below, weight(logit, best, 1.0), 0.0).to(tl.float64), 0)
        tl.store(outside + row * C + c, mass)
        tl.store(ties + row * C + c, tl.sum((inside & (logit == least)).to(tl.int32), 0))
    if DRAW:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            mass = tl.sum(tl.where(inside, weight(logit, best, temperature), 0.0).to(tl.float64), 0)
            tl.store(drawable + row * C + c, mass)


@triton.jit
def _draw(
    logits, values, ids, drawable, seeds, drawn, temperatures, top_ps, top_ks, min_ps, tokens, pending, stride, V, C,
    K: tl.constexpr, C2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    value, id = tl.load(values + row * K + k), tl.load(ids + row * K + k)
    temperature, top_p = tl.load(temperatures + row), tl.load(top_ps + row)
    top_k, min_p = tl.load(top_ks + row), tl.load(min_ps + row)
    top_k = tl.where(top_k < V, top_k, 0)
    best, least = tl.max(value, 0), tl.min(value, 0)
    token, code = tl.min(tl.where(value == best, id, V), 0), 0
    if temperature > 0:
        u = uniform(seeds, drawn, row)
        c = tl.arange(0, C2)
        sums = tl.load(drawable + row * C + c, mask=c < C, other=0.0)
        total = tl.sum(sums, 0)
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            weight_K = weight(value, best, temperature)
            mass_K = weight_K.to(tl.float64)
            limit = tl.where(top_k > 0, tl.max(tl.where(k == top_k - 1, value, float("-inf")), 0), float("-inf"))
            keep = value >= limit
            total = tl.where(top_k > 0, tl.sum(tl.where(keep, mass_K, 0.0), 0), total)
            kept = tl.where(keep, mass_K, 0.0)
            above = tl.cumsum(kept, 0) - kept
            bound = tl.where(top_p < 1, top_p.to(tl.float64) * total, float("inf"))
            stays = (keep & (above < bound)) | (k == 0)  # top_p 0 still leaves the most likely token
            threshold = tl.min(tl.where(stays, value, float("inf")), 0)
            keep = keep & (value >= threshold) & (weight_K >= min_p)
            # Cumulative weights in order of id: each candidate sums the kept candidates of no larger id.
            kept = tl.where(keep, mass_K, 0.0)
            ends = tl.sum(tl.where(id[:, None] <= id[None, :], kept[:, None], 0.0), 0)
            beyond = keep & (ends > u * tl.sum(kept, 0))
            last = tl.max(tl.where(keep, id, 0), 0)
            token = tl.minimum(tl.min(tl.where(beyond, id, V), 0), last)
            # Candidates are enough when a filter drops the least likely of them, and so everything less likely.
            dropped = ((top_p < 1) & (least < threshold)) | (tl.min(weight_K, 0) < min_p)
            enough = ((top_k > 0) & (least < limit)) | ((top_k <= 0) & dropped) | (V <= K)
            code = tl.where(enough, 0, tl.where(top_k > 0, 2, 1))
        else:
            token = pick(logits, sums, row, stride, V, best, temperature, float("-inf"), 0.0, u * total, C2, CHUNK)
    tl.store(tokens + row, tl.minimum(token, V - 1))  # rows that hold no numbers draw an id like any other
    tl.store(pending + row, code)


@triton.jit
def _capture(
    logits, values, ids, outside, ties, tokens, tail_bounds, k_maxes, packed, stride, V, C, K: tl.constexpr,
    C2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k, c = tl.arange(0, K), tl.arange(0, C2)
    tail_bound, k_max = tl.load(tail_bounds + row), tl.minimum(tl.load(k_maxes + row), tl.minimum(K, V))
    value, id = tl.load(values + row * K + k), tl.load(ids + row * K + k)
    token = tl.load(tokens + row).to(tl.int32)
    sampled = tl.load(logits + row * stride + token)
    best, least = tl.max(value, 0), tl.min(value, 0)
    mass_K = weight(value, best, 1.0).to(tl.float64)
    tied = tl.sum(tl.load(ties + row * C + c, mask=c < C, other=0), 0) - tl.sum((value == least).to(tl.int32), 0)
    beyond = tl.sum(tl.load(outside + row * C + c, mask=c < C, other=0.0), 0)
    beyond += tied.to(tl.float64) * weight(least, best, 1.0).to(tl.float64)
    total = beyond + tl.sum(mass_K, 0)

    # Sums of what lies outside are sums of outside terms, never 1 - the rest: a tail of 1e-12 keeps its digits.
    after = tl.sum(tl.where(k[:, None] > k[None, :], mass_K[:, None], 0.0), 0)
    left = beyond + after
    short = (left > tail_bound * total) & (k < k_max)
    count = tl.minimum(tl.sum(short.to(tl.int32), 0) + 1, k_max)
    present = tl.sum(((id == token) & (k < count)).to(tl.int32), 0) > 0
    candidate = tl.sum((id == token).to(tl.int32), 0) > 0
    count = tl.where(present, count, tl.minimum(count + 1, k_max))
    replaced = (k == count - 1) & (present == 0)
    inside = (k < count) & (replaced == 0)
    tail = tl.sum(tl.where(inside | (id == token), 0.0, mass_K), 0)
    tail += tl.where(candidate, beyond, tl.maximum(beyond - weight(sampled, best, 1.0).to(tl.float64), 0.0))
    logsumexp = best.to(tl.float64) + tl.log(total)
    logit = tl.where(replaced, sampled, value)
    logprob = (logit.to(tl.float64) - logsumexp).to(tl.float32)
    kept = k < count
    to = packed + row * (4 + 2 * K)
    tl.store(to, token)
    tl.store(to + 1, count)
    tl.store(to + 2, (tail / total).to(tl.float32).to(tl.int32, bitcast=True))
    tl.store(to + 3, logsumexp.to(tl.float32).to(tl.int32, bitcast=True))
    tl.store(to + 4 + k, tl.where(kept, tl.where(replaced, token, id), 0))
    tl.store(to + 4 + K + k, tl.where(kept, logprob, 0.0).to(tl.int32, bitcast=True))


def width(k_max: int, vocab: int) -> int:
    """Candidates of a step that must tell k_max of them apart: a power of two, 64 or more where there are as many."""
    wanted = triton.next_power_of_2(max(64, k_max))
    return min(wanted, 1 << (vocab.bit_length() - 1))


@dataclass
class HowDrawn:
    """Per row: seed (int64), tokens drawn so far (int32), temperature, top_p, top_k (int32), min_p; rest fp32."""

    seeds_A: Tensor
    drawn_A: Tensor
    temperature_A: Tensor
    top_p_A: Tensor
    top_k_A: Tensor
    min_p_A: Tensor


@dataclass
class HowCaptured:
    """Per row: most entries of a support (int32; 0: none are wanted), bound of the tail (fp32)."""

    k_max_A: Tensor
    tail_bound_A: Tensor


def step(logits_AV: Tensor, tokens_A: Tensor, how: HowDrawn | None, capture: HowCaptured | None, k: int) -> Tensor:
    """Draws into tokens_A (int32; without `how`, takes them from there); gives the packed result [A, 4 + 2k].

    Without `capture` the result is the tokens [A, 1]. logits_AV: fp32, rows may be strided. k: see `width`.
    """
    rows, vocab = logits_AV.shape
    stride, chunks = logits_AV.stride(0), triton.cdiv(vocab, CHUNK)
    shape = {"K": k, "C2": triton.next_power_of_2(chunks)}
    if how is None and (width := columns_of(vocab, k)):  # one read of the logits is enough
        values_AK, ids_AK, outside_A, ties_A = search(logits_AV, k, width, with_rest=True)
        return pack(logits_AV, values_AK, ids_AK, outside_A.unsqueeze(1), ties_A.unsqueeze(1), tokens_A, capture)
    values_AK, ids_AK = candidates(logits_AV, k)
    new = lambda dtype: torch.empty(rows, chunks, dtype=dtype, device=logits_AV.device)  # noqa: E731
    outside_AC, ties_AC, drawable_AC = new(torch.float64), new(torch.int32), new(torch.float64)
    _sums[(rows, chunks)](
        logits_AV, values_AK, how.temperature_A if how else values_AK, outside_AC, ties_AC, drawable_AC, stride, vocab,
        chunks, k, CHUNK=CHUNK, DRAW=how is not None, CAPTURE=capture is not None, num_warps=4,
    )  # fmt: skip
    if how is not None:
        pending_A = torch.empty(rows, dtype=torch.int32, device=logits_AV.device)
        params = how.seeds_A, how.drawn_A, how.temperature_A, how.top_p_A, how.top_k_A, how.min_p_A
        _draw[(rows,)](
            logits_AV, values_AK, ids_AK, drawable_AC, *params, tokens_A, pending_A, stride, vocab, chunks, **shape,
            CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
        if k < vocab:
            wide.draw(logits_AV, values_AK, drawable_AC, params, tokens_A, pending_A, CHUNK)
    if capture is None:
        return tokens_A.unsqueeze(1)
    return pack(logits_AV, values_AK, ids_AK, outside_AC, ties_AC, tokens_A, capture)


def pack(
    logits_AV: Tensor, values_AK: Tensor, ids_AK: Tensor, outside_AC: Tensor, ties_AC: Tensor, tokens_A: Tensor,
    capture: HowCaptured,
) -> Tensor:  # fmt: skip
    """The packed result [A, 4 + 2K] from the candidates and, by chunk, the mass below the last of them and its ties."""
    (rows, vocab), (k, chunks) = logits_AV.shape, (values_AK.shape[1], outside_AC.shape[1])
    packed_AW = torch.empty(rows, HEADER + 2 * k, dtype=torch.int32, device=logits_AV.device)
    _capture[(rows,)](
        logits_AV, values_AK, ids_AK, outside_AC, ties_AC, tokens_A, capture.tail_bound_A, capture.k_max_A, packed_AW,
        logits_AV.stride(0), vocab, chunks, K=k, C2=triton.next_power_of_2(chunks), num_warps=4,
    )  # fmt: skip
    return packed_AW
