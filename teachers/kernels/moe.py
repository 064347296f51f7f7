"""Routing and experts: the choice of experts, assignments grouped by expert, two grouped products.

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
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from teachers.kernels.chip import is_roomy


@dataclass(frozen=True)
class Tiles:
    """Launch shape of a grouped product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    described: bool = False  # weights through a tensor descriptor: Hopper's copy engine


# By the mean number of assignments an expert gets; the first bound that is not exceeded. Measured on an H100.
UP_TILES = {
    12: Tiles(16, 64, 128, 4, 3),
    96: Tiles(64, 128, 64, 4, 4),
    1 << 60: Tiles(128, 128, 64, 8, 4),
}
DOWN_TILES = {
    12: Tiles(16, 64, 128, 4, 5),
    40: Tiles(32, 64, 128, 4, 4),
    96: Tiles(64, 128, 64, 8, 4),
    1 << 60: Tiles(128, 256, 64, 8, 4, described=True),
}
FLOAT32_TILES = Tiles(32, 32, 32, 4, 2)  # for tests: speed does not matter
SMALL_TILES = Tiles(128, 64, 64, 4, 3)  # of a prefill where there is less shared memory
SMALL_STEP = 512  # tokens of a decode step, where a kernel's latency counts more than its work
ROUTER_ROWS, ROUTER_PARTS = 16, 8  # a decode step splits the router's product over its inputs
SMALL_ASSIGNMENTS = 4096  # grouped by one small kernel; more go through a sort
GROUP = 16  # work items of a prefill that share a pass over the weights


@triton.jit
def _route_parts(
    x, gate, parts, T, E, EACH, X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts, e = tl.arange(0, X), tl.arange(0, BLOCK_E)
    first = tl.program_id(1) * EACH
    logits = tl.zeros([BLOCK_M, X], tl.float32)
    for start in tl.range(first, tl.minimum(first + EACH, E), BLOCK_E, num_stages=3):
        inside = (start + e) < E
        x_ME = tl.load(x + t[:, None] * E + start + e[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0)
        gate_XE = tl.load(gate + experts[:, None] * E + start + e[None, :], mask=inside[None, :], other=0.0)
        logits = tl.dot(x_ME, tl.trans(gate_XE), logits, input_precision=PRECISION)
    to = parts + (tl.program_id(1) * T + t[:, None]) * X + experts[None, :]
    tl.store(to, logits, mask=(t < T)[:, None])


@triton.jit
def _choose(
    parts, bias, chosen, weights, active, T, scale, PARTS: tl.constexpr, X: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, X)
    logits = tl.zeros([X], tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(parts + (part * T + t) * X + x)
    scores = 1 / (1 + tl.exp(-logits))
    choice = scores + tl.load(bias + x)
    if TOP_GROUPS < GROUPS:
        choice_GS = tl.reshape(choice, [GROUPS, X // GROUPS])
        s, g = tl.arange(0, X // GROUPS)[None, :], tl.arange(0, GROUPS)
        best = tl.max(choice_GS, 1)
        where = tl.argmax(choice_GS, 1)
        second = tl.max(tl.where(s == where[:, None], float("-inf"), choice_GS), 1)
        total = best + second
        ahead = (total[None, :] > total[:, None]) | ((total[None, :] == total[:, None]) & (g[None, :] < g[:, None]))
        is_open = tl.sum(ahead.to(tl.int32), 1) < TOP_GROUPS
        choice = tl.reshape(tl.where(is_open[:, None], choice_GS, float("-inf")), [X])
    if AT_ONCE:
        # The place of an expert is the number of those ahead of it: more work, but no step waits for the one before.
        ahead = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & (x[None, :] < x[:, None]))
        place = tl.sum(ahead.to(tl.int32), 1)
    else:
        place = tl.full([X], K, tl.int32)
        for k in tl.static_range(K):
            top = tl.argmax(choice, 0)
            place = tl.where(x == top, k, place)
            choice = tl.where(x == top, float("-inf"), choice)
    mine = place < K
    if NORMED:
        scores = scores / (tl.sum(tl.where(mine, scores, 0.0), 0) + 1e-20)
    ids = tl.where(t < tl.load(active), x, X)
    tl.store(chosen + t * K + place, ids, mask=mine)
    tl.store(weights + t * K + place, scores * scale, mask=mine)


def route(
    x_TE: Tensor,
    gate_XE: Tensor,
    bias_X: Tensor,
    active_1: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normed: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Expert ids (int32) and weights (fp32) [T, K]; rows from active_1 on get the id X, which no expert has."""
    tokens, experts = x_TE.shape[0], gate_XE.shape[0]
    chosen_TK = torch.empty(tokens, top_k, dtype=torch.int32, device=x_TE.device)
    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=x_TE.device)
    parts_STX = _router_logits(x_TE, gate_XE)
    _choose[(tokens,)](
        parts_STX,
        bias_X,
        chosen_TK,
        weight_TK,
        active_1,
        tokens,
        scale,
        PARTS=len(parts_STX),
        X=experts,
        K=top_k,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        NORMED=normed,
        AT_ONCE=tokens <= SMALL_STEP and experts <= 64,
        num_warps=2 if tokens <= SMALL_STEP else 1,
    )
    return chosen_TK, weight_TK


def _router_logits(x_TE: Tensor, gate_XE: Tensor) -> Tensor:
    """fp32 [S, T, X], to be summed over S. Products of two bfloat16 are exact in fp32: the router of the reference."""
    (tokens, size), experts = x_TE.shape, gate_XE.shape[0]
    if x_TE.dtype != torch.bfloat16 or gate_XE.dtype != torch.bfloat16 or experts < 16:
        return F.linear(x_TE.float(), gate_XE.float()).unsqueeze(0)
    if tokens > SMALL_STEP:
        return torch.mm(x_TE, gate_XE.t(), out_dtype=torch.float32).unsqueeze(0)
    parts = ROUTER_PARTS if size >= 128 * ROUTER_PARTS else 1
    parts_STX = torch.empty(parts, tokens, experts, dtype=torch.float32, device=x_TE.device)
    each = triton.cdiv(triton.cdiv(size, parts), 128) * 128
    _route_parts[(triton.cdiv(tokens, ROUTER_ROWS), parts)](
        x_TE, gate_XE, parts_STX, tokens, size, each, X=experts, BLOCK_M=ROUTER_ROWS, BLOCK_E=128, PRECISION="ieee",
        num_warps=4,
    )  # fmt: skip
    return parts_STX


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


def group(chosen_TK: Tensor, gate_up: Tensor) -> Work:
    """The assignments by expert: one work item an expert when there are few, else one for every block of them.

    A token's choices differ. gate_up: [X, 2F, E], the experts' first weights.
    """
    (tokens, top_k), experts = chosen_TK.shape, len(gate_up)
    total, device = tokens * top_k, chosen_TK.device
    tiles = tuple(_tiles(table, total / experts, gate_up) for table in (UP_TILES, DOWN_TILES))
    if total > SMALL_ASSIGNMENTS:
        return _group_large(chosen_TK, experts, tiles)
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


def _group_large(chosen_TK: Tensor, experts: int, tiles: tuple[Tiles, Tiles]) -> Work:
    flat_A, block_m = chosen_TK.flatten(), tiles[0].block_m
    sorted_A, rows_A = flat_A.to(torch.int16).sort(stable=True)
    first_X1 = torch.searchsorted(sorted_A, torch.arange(experts + 1, dtype=torch.int16, device=flat_A.device))
    size_X = first_X1.diff()
    blocks_X = (size_X + block_m - 1) // block_m
    ends_X = blocks_X.cumsum(0)
    item_W = torch.arange(len(flat_A) // block_m + experts, device=flat_A.device)
    expert_W = torch.searchsorted(ends_X, item_W, right=True).clamp_(max=experts - 1)
    skipped_W = (item_W - (ends_X - blocks_X)[expert_W]) * block_m
    size_W = (size_X[expert_W] - skipped_W).clamp_(0, block_m)
    start_W = first_X1[expert_W] + skipped_W
    return Work(rows_A.int(), expert_W.int(), start_W.int(), size_W.int(), ends_X[-1:].int(), tiles)


@triton.jit
def _grouped(
    x, w, out, weights, rows, expert_of, start_of, size_of, count, W, IN, OUT, ITEMS, TOP_K: tl.constexpr,
    GATED: tl.constexpr, DESCRIBED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
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
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
            if GATED:
                if DESCRIBED:
                    up_tile = w.load([first_row + OUT + tile * BLOCK_N, at])
                elif WHOLE:
                    up_tile = tl.load(w_NK + OUT * IN + at)
                else:
                    up_tile = tl.load(w_NK + OUT * IN + at, mask=inside, other=0.0)
                up = tl.dot(x_tile, tl.trans(up_tile), up, input_precision=PRECISION)
        if GATED:
            acc = acc / (1 + tl.exp(-acc)) * up
            to = out + place[:, None] * OUT + n[None, :]
        else:
            acc = acc * tl.load(weights + a, mask=m < size, other=0.0)[:, None]
            to = out + a[:, None] * OUT + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(m < size)[:, None] & (n < OUT)[None, :])


def _launch(x: Tensor, w: Tensor, out: Tensor, weights: Tensor, work: Work, top_k: int, gated: bool, tiles: Tiles):
    inputs, outputs = w.shape[2], w.shape[1] // 2 if gated else w.shape[1]
    items = len(work.expert_W)
    block_k = min(tiles.block_k, triton.next_power_of_2(inputs))
    whole = inputs % block_k == 0 and outputs % tiles.block_n == 0
    described = tiles.described and whole
    if described:
        w = TensorDescriptor.from_tensor(w.flatten(0, 1), [tiles.block_n, block_k])
        x = x if gated else TensorDescriptor.from_tensor(x, [tiles.block_m, block_k])
    _grouped[(items * triton.cdiv(outputs, tiles.block_n),)](
        x,
        w,
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
        GROUP if tiles.block_m >= 128 else items,
        TOP_K=top_k,
        GATED=gated,
        DESCRIBED=described,
        WHOLE=whole,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        STAGES=tiles.num_stages,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
    )


def experts(x_TE: Tensor, work: Work, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, K, E]: each choice's weight times its expert's output. gate_up: [X, 2F, E], down: [X, E, F].

    Rows without an expert keep what the memory held.
    """
    tokens, top_k = weight_TK.shape
    act_AF = x_TE.new_empty(len(work.rows_A), gate_up.shape[1] // 2)
    out_TKE = x_TE.new_empty(tokens, top_k, x_TE.shape[1])
    _launch(x_TE, gate_up, act_AF, weight_TK, work, top_k, True, work.tiles[0])
    _launch(act_AF, down, out_TKE, weight_TK, work, top_k, False, work.tiles[1])
    return out_TKE
