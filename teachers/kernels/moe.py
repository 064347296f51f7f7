"""Experts: assignments grouped by expert, two grouped products.

An assignment is one (token, choice) pair, a = token * K + choice. Work items are stretches of `rows`, a list of
assignments grouped by expert: a whole expert when few tokens are decoded, so that its weights are read once, or at most
BLOCK_M of its assignments in a prefill. The first product gathers its rows and leaves them in the order of the list,
the second writes each to its assignment's place: nothing is gathered back, and a token's K outputs are summed with the
next norm.

Shape legend: T tokens, E hidden size, X experts, K experts a token, F width of an expert, W work items.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from teachers.kernels.chip import is_roomy
from teachers.kernels.grouping import by_expert
from teachers.scaled import BLOCK, ScaledWeights


@dataclass(frozen=True)
class Tiles:
    """Launch shape of a grouped product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    described: bool = False  # weights through a tensor descriptor: Hopper's copy engine
    group: int = 16  # work items of a prefill that share a pass over the weights


# By the mean number of assignments an expert gets; the first bound that is not exceeded. Measured on an H100.
UP_TILES = {
    12: Tiles(16, 64, 128, 4, 3),
    96: Tiles(64, 128, 64, 4, 4),
    1 << 60: Tiles(128, 128, 64, 8, 3, described=True),
}
DOWN_TILES = {
    12: Tiles(16, 64, 128, 4, 5),
    40: Tiles(32, 64, 128, 4, 4),
    96: Tiles(64, 128, 64, 8, 4),
    1 << 60: Tiles(128, 256, 64, 8, 3, described=True, group=8),
}
FLOAT32_TILES = Tiles(32, 32, 32, 4, 2)  # for tests: speed does not matter
SMALL_TILES = Tiles(128, 64, 64, 4, 3)  # of a prefill where there is less shared memory
SMALL_ASSIGNMENTS = 4096  # grouped by one small kernel
WIDENED_FROM = 128  # rows of a work item from which FP8 weights are widened once, not anew in each work item


@dataclass
class Work:
    """rows_A: assignments grouped by expert. Item w < count_1: stretch [start_W, start_W + size_W) of expert_W."""

    rows_A: Tensor
    expert_W: Tensor
    start_W: Tensor
    size_W: Tensor
    count_1: Tensor
    tiles: tuple[Tiles, Tiles]  # of the two products


@triton.jit
def _group_small(
    chosen, rows, expert_of, start_of, size_of, count, A, CAPACITY, X: tl.constexpr, X2: tl.constexpr,
    A2: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    a, x = tl.arange(0, A2), tl.arange(0, X2)
    ids = tl.load(chosen + a, mask=a < A, other=X)
    sizes = tl.histogram(ids, X2)
    used = (sizes > 0) & (x < X)
    item = tl.sum((used & (x < expert)).to(tl.int32), 0)
    size = tl.sum(tl.where(x == expert, sizes, 0), 0)
    mine = ids == expert
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(rows + item * CAPACITY + rank, a, mask=mine)
    if size > 0:
        tl.store(expert_of + item, expert)
        tl.store(start_of + item, item * CAPACITY)
        tl.store(size_of + item, size)
    if expert == 0:
        tl.store(count, tl.sum(used.to(tl.int32), 0))


def group(chosen_TK: Tensor, gate_up: Tensor, of: int | None = None) -> Work:
    """The assignments by expert: one work item an expert when there are few, else one for every block of them.

    A token's choices differ. gate_up: [X, 2F, E], the experts' first weights. of: how many experts share the
    assignments, where others than these X do.
    """
    (tokens, top_k), experts = chosen_TK.shape, len(gate_up)
    total, device = tokens * top_k, chosen_TK.device
    tiles = tuple(_tiles(table, total / (of or experts), gate_up) for table in (UP_TILES, DOWN_TILES))
    if total > SMALL_ASSIGNMENTS:
        return Work(*by_expert(chosen_TK, experts, tiles[0].block_m), tiles)
    items = min(experts, total)
    new = lambda size: torch.empty(size, dtype=torch.int32, device=device)  # noqa: E731
    work = Work(new(items * tokens), new(items), new(items), new(items), new(1), tiles)
    _group_small[(experts,)](
        chosen_TK,
        work.rows_A,
        work.expert_W,
        work.start_W,
        work.size_W,
        work.count_1,
        total,
        tokens,
        X=experts,
        X2=triton.next_power_of_2(experts + 1),
        A2=triton.next_power_of_2(total),
        num_warps=4,
    )
    return work


def _tiles(table: dict[int, Tiles], mean: float, weights: Tensor) -> Tiles:
    if weights.dtype == torch.float32:
        return FLOAT32_TILES
    tiles = next(tiles for bound, tiles in table.items() if mean <= bound)
    return tiles if tiles.block_m < SMALL_TILES.block_m or is_roomy(weights.device) else SMALL_TILES


@triton.jit
def _grouped(
    x, w, scales, out, weights, rows, expert_of, start_of, size_of, count, W, IN, OUT, ITEMS, TOP_K: tl.constexpr,
    GATED: tl.constexpr, DESCRIBED: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Items of a group stand next to each other for one tile of outputs: they share reads of the weights in L2.
    pid, tiles = tl.program_id(0), tl.cdiv(OUT, BLOCK_N)
    group = pid // (ITEMS * tiles)
    in_group = tl.minimum(W - group * ITEMS, ITEMS)
    item = group * ITEMS + (pid % (ITEMS * tiles)) % in_group
    tile = (pid % (ITEMS * tiles)) // in_group
    if item >= tl.load(count):
        return
    expert = tl.load(expert_of + item)
    start, size = tl.load(start_of + item), tl.load(size_of + item)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first_row = expert * (2 * OUT if GATED else OUT)
    if not DESCRIBED:
        row_N = first_row.to(tl.int64) + (n if WHOLE else tl.minimum(n, OUT - 1))
        w_NK = w + row_N[:, None] * IN + k[None, :]
    if SCALED:  # a factor for each block of SCALED x SCALED weights, gate above up
        blocks = tl.cdiv(OUT, SCALED)
        row_N = expert * (2 * blocks if GATED else blocks) + tl.minimum(n, OUT - 1) // SCALED
        scale_N = scales + row_N * tl.cdiv(IN, SCALED)
    for first in range(0, size, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        a = tl.load(rows + start + m, mask=m < size, other=0).to(tl.int64)
        place = (start + tl.minimum(m, size - 1)).to(tl.int64)  # in the list of assignments grouped by expert
        if GATED:
            x_MK = x + (a // TOP_K)[:, None] * IN + k[None, :]
        elif not DESCRIBED:
            x_MK = x + place[:, None] * IN + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in tl.range(0, IN, BLOCK_K, num_stages=STAGES):
            if DESCRIBED and not GATED:
                x_tile = x.load([start + first, at])
            elif WHOLE:
                x_tile = tl.load(x_MK + at)
            else:
                inside = (at + k)[None, :] < IN
                x_tile = tl.load(x_MK + at, mask=inside, other=0.0)
            if DESCRIBED:
                w_tile = w.load([first_row + tile * BLOCK_N, at])
            elif WHOLE:
                w_tile = tl.load(w_NK + at)
            else:
                w_tile = tl.load(w_NK + at, mask=inside, other=0.0)
            if SCALED:
                part = tl.dot(x_tile, tl.trans(w_tile).to(x_tile.dtype), input_precision=PRECISION)
                acc += part * tl.load(scale_N + at // SCALED)[None, :]
            else:
                acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
            if GATED:
                if DESCRIBED:
                    up_tile = w.load([first_row + OUT + tile * BLOCK_N, at])
                elif WHOLE:
                    up_tile = tl.load(w_NK + OUT * IN + at)
                else:
                    up_tile = tl.load(w_NK + OUT * IN + at, mask=inside, other=0.0)
                if SCALED:
                    part = tl.dot(x_tile, tl.trans(up_tile).to(x_tile.dtype), input_precision=PRECISION)
                    up += part * tl.load(scale_N + blocks * tl.cdiv(IN, SCALED) + at // SCALED)[None, :]
                else:
                    up = tl.dot(x_tile, tl.trans(up_tile), up, input_precision=PRECISION)
        if GATED:
            acc = acc / (1 + tl.exp(-acc)) * up
            to = out + place[:, None] * OUT + n[None, :]
        else:
            acc = acc * tl.load(weights + a, mask=m < size, other=0.0)[:, None]
            to = out + a[:, None] * OUT + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(m < size)[:, None] & (n < OUT)[None, :])


def _launch(
    x: Tensor,
    w: Tensor | ScaledWeights,
    out: Tensor,
    weights: Tensor,
    work: Work,
    top_k: int,
    gated: bool,
    tiles: Tiles,
):
    inputs, outputs = w.shape[2], w.shape[1] // 2 if gated else w.shape[1]
    items = len(work.expert_W)
    block_k = min(tiles.block_k, triton.next_power_of_2(inputs))
    whole = inputs % block_k == 0 and outputs % tiles.block_n == 0
    scales, is_scaled = weights, isinstance(w, ScaledWeights)
    described = tiles.described and whole and not is_scaled
    if is_scaled:
        w, scales = w.values_XPNK, w.scales_XPRC
    if described:
        w = TensorDescriptor.from_tensor(w.flatten(0, 1), [tiles.block_n, block_k])
        x = x if gated else TensorDescriptor.from_tensor(x, [tiles.block_m, block_k])
    _grouped[(items * triton.cdiv(outputs, tiles.block_n),)](
        x,
        w,
        scales,
        out,
        weights,
        work.rows_A,
        work.expert_W,
        work.start_W,
        work.size_W,
        work.count_1,
        items,
        inputs,
        outputs,
        tiles.group if tiles.block_m >= 128 else items,
        TOP_K=top_k,
        GATED=gated,
        DESCRIBED=described,
        SCALED=BLOCK if is_scaled else 0,
        WHOLE=whole,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        STAGES=tiles.num_stages,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
    )


@triton.jit
def _widen(values, scales, out, N, K, SIDE: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    inside = (i < N)[:, None] & (j < K)[None, :]
    at = matrix * N * K + i[:, None] * K + j[None, :]
    scale = tl.load(scales + (matrix * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2))
    wide = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


def widen(weights: ScaledWeights, dtype: torch.dtype) -> Tensor:
    """ScaledWeights.widened in one pass, for as long as one prefill of a layer needs it."""
    experts, parts, rows, columns = weights.values_XPNK.shape
    out = torch.empty(weights.shape, dtype=dtype, device=weights.device)
    grid = (experts * parts, triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    _widen[grid](weights.values_XPNK, weights.scales_XPRC, out, rows, columns, SIDE=BLOCK, num_warps=8)
    return out


def experts(
    x_TE: Tensor, work: Work, weight_TK: Tensor, gate_up: Tensor | ScaledWeights, down: Tensor | ScaledWeights
) -> Tensor:
    """[T, K, E]: each choice's weight times its expert's output. gate_up: [X, 2F, E], down: [X, E, F].

    Rows without an expert keep what the memory held.
    """
    tokens, top_k = weight_TK.shape
    if isinstance(gate_up, ScaledWeights) and work.tiles[0].block_m >= WIDENED_FROM:
        gate_up, down = widen(gate_up, x_TE.dtype), widen(down, x_TE.dtype)
    act_AF = x_TE.new_empty(len(work.rows_A), gate_up.shape[1] // 2)
    out_TKE = x_TE.new_empty(tokens, top_k, x_TE.shape[1])
    _launch(x_TE, gate_up, act_AF, weight_TK, work, top_k, True, work.tiles[0])
    _launch(act_AF, down, out_TKE, weight_TK, work, top_k, False, work.tiles[1])
    return out_TKE
