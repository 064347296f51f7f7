"""Attention of grouped query heads over paged keys and values: one new token a row, or a ragged list of new tokens.

Decoding: a program takes one row, one key-value head with the query heads that share it, and one stretch of the row's
tokens, with a running softmax; a second kernel joins the stretches. Keys and values are the long side of every product,
as in teachers.kernels.mla.

Shape legend: A rows, T new tokens, S tokens attended to, H query heads, K key-value heads, G = H / K query heads of a
group, D head size (D2: the next power of two), N tokens of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers import plain
from teachers.kernels.chip import is_roomy
from teachers.kernels.mla import Splits, Tiles

TILES = Tiles(block_n=64, num_warps=4, num_stages=3, programs=528)  # measured on an H100, as what follows
SMALL_TILES = Tiles(block_n=32, num_warps=4, num_stages=3, programs=432)  # where there is less shared memory
CROWDED_N = 32  # tokens of a tile where rows alone fill the device: more programs at once hide each other's waits
GROUP = 16  # query heads in a product, at least: its short side


@triton.jit
def _attend(
    query, pool, tables, lengths, mixed, sums, scale, query_stride, table_stride, SPLITS, K: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, split, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g, d, n = tl.arange(0, BLOCK_G), tl.arange(0, D2), tl.arange(0, BLOCK_N)
    mine = g < G
    h = head * G + g
    length = tl.load(lengths + row) + 1  # the new token is in the cache already
    tiles = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(tiles, SPLITS)
    start, stop = split * each, tl.minimum(split * each + each, tiles)

    source = query + row * query_stride + h[:, None] * D + d[None, :]
    query_GD = tl.load(source, mask=mine[:, None] & (d < D)[None, :], other=0.0)
    query_DG = tl.trans(query_GD)
    best_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total_G = tl.zeros([BLOCK_G], tl.float32)
    mixed_DG = tl.zeros([D2, BLOCK_G], tl.float32)
    for tile in tl.range(start, stop, num_stages=STAGES):
        first = tile * BLOCK_N
        page = tl.load(tables + row * table_stride + first // PAGE).to(tl.int64)
        at = pool + (page * PAGE + first % PAGE + n[:, None]) * (2 * K * D) + head * D + d[None, :]
        if D == D2:
            key_ND, value_ND = tl.load(at), tl.load(at + K * D)
        else:
            key_ND = tl.load(at, mask=(d < D)[None, :], other=0.0)
            value_ND = tl.load(at + K * D, mask=(d < D)[None, :], other=0.0)
        score_NG = tl.dot(key_ND, query_DG, input_precision=PRECISION)
        score_NG = tl.where((first + n < length)[:, None], score_NG * scale, float("-inf"))
        new_G = tl.maximum(best_G, tl.max(score_NG, 0))
        weight_NG = tl.exp2(score_NG - new_G[None, :])
        shrink_G = tl.exp2(best_G - new_G)
        total_G = total_G * shrink_G + tl.sum(weight_NG, 0)
        mixed_DG = mixed_DG * shrink_G[None, :]
        mixed_DG = tl.dot(tl.trans(value_ND), weight_NG.to(value_ND.dtype), mixed_DG, input_precision=PRECISION)
        best_G = new_G

    if DIRECT:
        to = mixed + (row * K * G + h)[None, :] * D2 + d[:, None]
        tl.store(to, (mixed_DG / total_G[None, :]).to(mixed.dtype.element_ty), mask=mine[None, :])
    else:
        part = (row * SPLITS + split) * K * G + h
        safe_G = tl.where(total_G > 0, total_G, 1.0)
        tl.store(mixed + part[None, :] * D2 + d[:, None], mixed_DG / safe_G[None, :], mask=mine[None, :])
        tl.store(sums + part, tl.where(total_G > 0, best_G + tl.log2(safe_G), float("-inf")), mask=mine)


def gqa_decode(
    query_AHD: Tensor, pool_GTL: Tensor, tables_AG: Tensor, lengths_A: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """[A, H, D] of one new token a row: softmax(scale * q . k) v over lengths_A + 1 cached tokens.

    pool_GTL: [pages, page tokens, 2 K D], the keys of K heads, then their values. Query head h reads head h K // H.
    """
    rows, heads, size = query_AHD.shape
    page, padded = pool_GTL.shape[1], triton.next_power_of_2(size)
    tiles = TILES if is_roomy(query_AHD.device) else SMALL_TILES
    splits = Splits.of(query_AHD, heads, padded, tiles.programs, kv_heads)
    _attend[(rows, splits.count, kv_heads)](
        query_AHD,
        pool_GTL,
        tables_AG,
        lengths_A,
        splits.parts,
        splits.sums,
        scale * 1.4426950408889634,
        query_AHD.stride(0),
        tables_AG.stride(0),
        splits.count,
        K=kv_heads,
        G=heads // kv_heads,
        D=size,
        D2=padded,
        PAGE=page,
        BLOCK_G=max(GROUP, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_N=min(CROWDED_N if splits.direct else tiles.block_n, page),
        STAGES=tiles.num_stages,
        DIRECT=splits.direct,
        PRECISION="ieee" if query_AHD.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
    )
    return splits.joined()[..., :size]


def attend_ragged(query_THD: Tensor, key_SKD: Tensor, value_SKD: Tensor, ragged, scale: float) -> Tensor:
    """Causal attention [T, H, D] of each sequence's new tokens, its last ones, over all of its tokens, in one kernel.

    ragged: the sequences' lengths in T and in S, and the running sums (teachers.dense.Ragged).
    """
    if query_THD.dtype == torch.float32:  # the kernel knows half precision alone
        return plain.attend_ragged(query_THD, key_SKD, value_SKD, ragged, scale)
    # Flash attention itself: its wrappers of the oldest torch that is supported refuse grouped heads, which it reads.
    return torch.ops.aten._flash_attention_forward(
        query_THD, key_SKD, value_SKD, ragged.new_ends, ragged.whole_ends, max(ragged.new), max(ragged.whole),
        0.0, True, False, scale=scale,
    )[0]  # fmt: skip


@triton.jit
def _rotate_heads(
    heads, positions, slots, cos_table, sin_table, norms, pool, eps, stride, H: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, HALF2: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_POOL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = D // 2
    h, i = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, HALF2)
    pair = (i < HALF)[None, :]
    inside, turns = (h < H + 2 * K)[:, None] & pair, (h < H + K)[:, None] & pair
    kept = inside & (h >= H)[:, None]
    at = heads + row * stride + h[:, None] * D + i[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cos_table + position * HALF + i[None, :], mask=pair, other=0.0)
    sin = tl.load(sin_table + position * HALF + i[None, :], mask=pair, other=0.0)
    x, y = first, second
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
        at_weight = norms + (h >= H).to(tl.int32)[:, None] * D + i[None, :]
        weight, weight2 = tl.load(at_weight, mask=turns, other=0.0), tl.load(at_weight + HALF, mask=turns, other=0.0)
        x = (x * scale).to(heads.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
        y = (y * scale).to(heads.dtype.element_ty).to(tl.float32) * weight2.to(tl.float32)
    first = tl.where(turns, x * cos - y * sin, first).to(heads.dtype.element_ty)
    second = tl.where(turns, y * cos + x * sin, second).to(heads.dtype.element_ty)
    tl.debug_barrier()  # heads are rotated where they lie: every number is read before any is written
    tl.store(at, first, mask=turns)
    tl.store(at + HALF, second, mask=turns)
    if HAS_POOL:
        to = pool + tl.load(slots + row).to(tl.int64) * (2 * K * D) + (h - H)[:, None] * D + i[None, :]
        tl.store(to, first, mask=kept)
        tl.store(to + HALF, second, mask=kept)


def rotate_heads(
    heads_TXD: Tensor,
    kv_heads: int,
    positions_T: Tensor,
    slots_T: Tensor | None,
    tables: tuple[Tensor, Tensor],
    norms_2D: Tensor | None,
    eps: float,
    pool_GTL: Tensor | None,
) -> None:
    """Norms (norms_2D: weights of queries and of keys) and rotates, in place, the query and key heads of queries, keys
    and values side by side; writes keys and values to slot slots_T of the pool.

    tables: cos and sin [positions, D / 2]; pairs are (i, i + D / 2).
    """
    tokens, heads, size = heads_TXD.shape
    block = 8
    _rotate_heads[(tokens, triton.cdiv(heads, block))](
        heads_TXD,
        positions_T,
        positions_T if slots_T is None else slots_T,
        *tables,
        heads_TXD if norms_2D is None else norms_2D,
        heads_TXD if pool_GTL is None else pool_GTL,
        eps,
        heads_TXD.stride(0),
        H=heads - 2 * kv_heads,
        K=kv_heads,
        D=size,
        HALF2=triton.next_power_of_2(size // 2),
        HAS_NORMS=norms_2D is not None,
        HAS_POOL=pool_GTL is not None,
        BLOCK_H=block,
        num_warps=2 if size <= 128 else 4,
    )
