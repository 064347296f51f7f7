"""Norms, rotary embedding and the cache write, gated activation: one read and one write of each tensor.

Shape legend: T tokens, E hidden size, K experts a token, H heads, Q = N + P query size (content, rotary), R latent
rank, F width of an MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm(
    residual, delta, experts, active, weight, out, eps, E, HAS_DELTA: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(residual + row * E + e, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + row * E + e, mask=inside, other=0.0).to(tl.float32)
    if K > 0:
        routed = inside & (row < tl.load(active))
        for k in tl.static_range(K):
            x += tl.load(experts + (row * K + k) * E + e, mask=routed, other=0.0).to(tl.float32)
    if HAS_DELTA or K > 0:
        stored = x.to(residual.dtype.element_ty)
        tl.store(residual + row * E + e, stored, mask=inside)
        x = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / E + eps)
    normed = (x * scale).to(out.dtype.element_ty) * tl.load(weight + e, mask=inside, other=0.0)
    tl.store(out + row * E + e, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(
    residual_TE: Tensor,
    delta_TE: Tensor | None,
    experts_TKE: Tensor | None,
    active_1: Tensor | None,
    weight_E: Tensor,
    eps: float,
) -> Tensor:
    """RMSNorm [T, E] of the residual after adding to it, in place, a delta and, to the first active_1 rows, the K
    expert outputs of each token."""
    tokens, size = residual_TE.shape
    out_TE = torch.empty_like(residual_TE)
    _add_norm[(tokens,)](
        residual_TE,
        residual_TE if delta_TE is None else delta_TE,
        residual_TE if experts_TKE is None else experts_TKE,
        residual_TE if active_1 is None else active_1,
        weight_E,
        out_TE,
        eps,
        size,
        HAS_DELTA=delta_TE is not None,
        K=0 if experts_TKE is None else experts_TKE.shape[1],
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size >= 2048 else 4,
    )
    return out_TE


@triton.jit
def _combine(parts, chosen, out, X, E, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        size = tl.where(tl.load(chosen + row * K + k) < X, E, 0)
        total += tl.load(parts + (row * K + k) * E + e, mask=e < size, other=0.0).to(tl.float32)
    tl.store(out + row * E + e, total.to(out.dtype.element_ty), mask=e < E)


def combine(out_TKE: Tensor, chosen_TK: Tensor, experts: int) -> Tensor:
    """[T, E]: the sum of each token's outputs, without those of choices that are none of the `experts`."""
    tokens, top_k, size = out_TKE.shape
    sum_TE = out_TKE.new_empty(tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _combine[(tokens, triton.cdiv(size, block))](out_TKE, chosen_TK, sum_TE, experts, size, K=top_k, BLOCK=block)
    return sum_TE


@triton.jit
def _silu_mul(gate_up, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate = tl.load(gate_up + row * 2 * F + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], of the two halves side by side."""
    tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = gate_up_T2F.new_empty(tokens, width)
    block = min(2048, triton.next_power_of_2(width))
    _silu_mul[(tokens, triton.cdiv(width, block))](gate_up_T2F, out_TF, width, BLOCK=block, num_warps=4)
    return out_TF


@triton.jit
def _spread(source, target, source_stride, stride_t, stride_h, H, P, H2: tl.constexpr, P2: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h, p = tl.arange(0, H2), tl.arange(0, P2)
    shared = tl.load(source + row * source_stride + p, mask=p < P, other=0.0)
    to = target + row * stride_t + h[:, None] * stride_h + p[None, :]
    tl.store(to, tl.broadcast_to(shared[None, :], [H2, P2]), mask=(h < H)[:, None] & (p < P)[None, :])


def spread(source_TP: Tensor, target_THP: Tensor) -> None:
    """Writes what all heads share to each of them."""
    tokens, heads, size = target_THP.shape
    _spread[(tokens,)](
        source_TP, target_THP, source_TP.stride(0), target_THP.stride(0), target_THP.stride(1), heads, size,
        H2=triton.next_power_of_2(heads), P2=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_and_cache(
    source, latent_source, positions, slots, cos_table, sin_table, weight, query, latents, pool, eps, source_stride,
    latent_stride, query_stride_t, query_stride_h, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_LATENTS: tl.constexpr, HAS_POOL: tl.constexpr, H2: tl.constexpr, R2: tl.constexpr,
    HALF2: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = P // 2
    i = tl.arange(0, HALF2)
    pair = i < HALF
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cos_table + position * HALF + i, mask=pair, other=0.0)
    sin = tl.load(sin_table + position * HALF + i, mask=pair, other=0.0)
    if INTERLEAVED:
        first_at, second_at = 2 * i, 2 * i + 1
    else:
        first_at, second_at = i, i + HALF

    h = tl.arange(0, H2)
    heads = (h < H)[:, None] & pair[None, :]
    at = source + row * source_stride + h[:, None] * (N + P) + N
    first = tl.load(at + first_at[None, :], mask=heads, other=0.0).to(tl.float32)
    second = tl.load(at + second_at[None, :], mask=heads, other=0.0).to(tl.float32)
    first, second = _rotate(first, second, cos[None, :], sin[None, :])
    to = query + row * query_stride_t + h[:, None] * query_stride_h + i[None, :]
    tl.debug_barrier()  # a query may be rotated where it lies: every value is read before any is written
    tl.store(to, first.to(query.dtype.element_ty), mask=heads)
    tl.store(to + HALF, second.to(query.dtype.element_ty), mask=heads)

    r = tl.arange(0, R2)
    rank = r < R
    at = latent_source + row * latent_stride
    latent = tl.load(at + r, mask=rank, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(latent * latent, 0) / R + eps)
    latent = (latent * scale).to(source.dtype.element_ty) * tl.load(weight + r, mask=rank, other=0.0)
    first = tl.load(at + R + first_at, mask=pair, other=0.0).to(tl.float32)
    second = tl.load(at + R + second_at, mask=pair, other=0.0).to(tl.float32)
    first, second = _rotate(first, second, cos, sin)
    if HAS_LATENTS:
        to = latents + row * (R + P)
        tl.store(to + r, latent.to(latents.dtype.element_ty), mask=rank)
        tl.store(to + R + i, first.to(latents.dtype.element_ty), mask=pair)
        tl.store(to + R + HALF + i, second.to(latents.dtype.element_ty), mask=pair)
    if HAS_POOL:
        to = pool + tl.load(slots + row).to(tl.int64) * (R + P)
        tl.store(to + r, latent.to(pool.dtype.element_ty), mask=rank)
        tl.store(to + R + i, first.to(pool.dtype.element_ty), mask=pair)
        tl.store(to + R + HALF + i, second.to(pool.dtype.element_ty), mask=pair)


def rope_and_cache(
    source_THQ: Tensor,
    latent_TL: Tensor,
    positions_T: Tensor,
    slots_T: Tensor | None,
    tables: tuple[Tensor, Tensor],
    norm_weight_R: Tensor,
    eps: float,
    query_THP: Tensor,
    latents_TL: Tensor | None,
    pool_GTL: Tensor | None,
    *,
    interleaved: bool,
) -> None:
    """Rotates the queries' last P numbers into query_THP (it may be that same memory); norms the first R numbers of
    latent_TL, rotates its last P, and writes them to latents_TL [T, R + P] and to slot slots_T of the pool.

    tables: cos and sin [positions, P / 2]. Pairs (2i, 2i + 1) if interleaved, else (i, i + P / 2), go to i, i + P / 2.
    """
    tokens, heads, rotary = query_THP.shape
    rank = norm_weight_R.shape[0]
    _rope_and_cache[(tokens,)](
        source_THQ,
        latent_TL,
        positions_T,
        positions_T if slots_T is None else slots_T,
        *tables,
        norm_weight_R,
        query_THP,
        query_THP if latents_TL is None else latents_TL,
        query_THP if pool_GTL is None else pool_GTL,
        eps,
        source_THQ.stride(0),
        latent_TL.stride(0),
        query_THP.stride(0),
        query_THP.stride(1),
        H=heads,
        N=source_THQ.shape[2] - rotary,
        P=rotary,
        R=rank,
        INTERLEAVED=interleaved,
        HAS_LATENTS=latents_TL is not None,
        HAS_POOL=pool_GTL is not None,
        H2=triton.next_power_of_2(heads),
        R2=triton.next_power_of_2(rank),
        HALF2=triton.next_power_of_2(rotary // 2),
        num_warps=4,
    )
