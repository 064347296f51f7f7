"""The assignments of a prefill grouped by expert: a stable counting sort over as many experts as there are.

Three small kernels in the place of a general sort and its two dozen companions: count the experts of every block of
assignments; give every block and expert its place in the list; put each assignment there. The order is that of a stable
sort, so a list never depends on timing.

Shape legend: A assignments, B blocks of them, X experts, W work items.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE = 128  # assignments of a block that are compared with all experts at once
COUNTS = 1 << 14  # counts that one program holds


@triton.jit
def _count(chosen, counts, A, EACH, X: tl.constexpr, X2: tl.constexpr, SLICE: tl.constexpr):
    block, x = tl.program_id(0), tl.arange(0, X2)
    total = tl.zeros([X2], tl.int32)
    for start in range(block * EACH, block * EACH + EACH, SLICE):
        a = start + tl.arange(0, SLICE)
        ids = tl.load(chosen + a, mask=a < A, other=X2)
        total += tl.sum((ids[:, None] == x[None, :]).to(tl.int32), 0)
    tl.store(counts + block * X + x, total, mask=x < X)


@triton.jit
def _place(counts, places, first, blocks_of, B, BLOCK_M, X: tl.constexpr, X2: tl.constexpr, B2: tl.constexpr):
    b, x = tl.arange(0, B2), tl.arange(0, X2)
    at = b[:, None] * X + x[None, :]
    inside = (b < B)[:, None] & (x < X)[None, :]
    count = tl.load(counts + at, mask=inside, other=0)
    size = tl.sum(count, 0)
    start = tl.cumsum(size, 0) - size
    tl.store(places + at, start[None, :] + tl.cumsum(count, 0) - count, mask=inside)
    tl.store(first + x, start, mask=x <= X)  # that of the expert after the last: how many there are in all
    tl.store(blocks_of + x, tl.cumsum((size + BLOCK_M - 1) // BLOCK_M, 0), mask=x < X)


@triton.jit
def _put(
    chosen, places, first, blocks_of, rows, expert_of, start_of, size_of, A, EACH, W, BLOCK_M, X: tl.constexpr,
    X2: tl.constexpr, SLICE: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    block, x = tl.program_id(0), tl.arange(0, X2)
    place = tl.load(places + block * X + x, mask=x < X, other=0)
    for start in range(block * EACH, block * EACH + EACH, SLICE):
        a = start + tl.arange(0, SLICE)
        ids = tl.load(chosen + a, mask=a < A, other=X2)
        mine = ids[:, None] == x[None, :]
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1 + place[None, :]
        tl.store(rows + tl.sum(tl.where(mine, rank, 0), 1), a, mask=ids < X)
        place += tl.sum(mine.to(tl.int32), 0)
    # The work items, spread over the same programs.
    ends = tl.load(blocks_of + x, mask=x < X, other=0x7FFFFFFF)
    item = block * ITEMS + tl.arange(0, ITEMS)
    expert = tl.sum((ends[None, :] <= item[:, None]).to(tl.int32), 1)
    used = (expert < X) & (item < W)
    before = tl.load(blocks_of + expert - 1, mask=used & (expert > 0), other=0)
    start = tl.load(first + expert, mask=used, other=0) + (item - before) * BLOCK_M
    stop = tl.load(first + expert + 1, mask=used, other=0)
    tl.store(expert_of + item, expert, mask=used)
    tl.store(start_of + item, start, mask=used)
    tl.store(size_of + item, tl.minimum(stop - start, BLOCK_M), mask=used)


def by_expert(chosen_TK: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """rows_A, expert_W, start_W, size_W and count_1 (int32) of teachers.kernels.moe.Work: items of at most block_m.

    Assignments of the id `experts` belong to nobody and are in no item.
    """
    total, x2 = chosen_TK.numel(), triton.next_power_of_2(experts + 1)
    each = max(4 * SLICE, triton.next_power_of_2(triton.cdiv(total * x2, COUNTS)))
    blocks, items = triton.cdiv(total, each), total // block_m + experts
    new = lambda size: torch.empty(size, dtype=torch.int32, device=chosen_TK.device)  # noqa: E731
    counts_BX, places_BX = new(blocks * experts), new(blocks * experts)
    first_X1, ends_X = new(experts + 1), new(experts)
    rows_A, expert_W, start_W, size_W = new(total), new(items), new(items), new(items)
    of = {"X": experts, "X2": x2}
    _count[(blocks,)](chosen_TK, counts_BX, total, each, **of, SLICE=SLICE, num_warps=4)
    _place[(1,)](
        counts_BX, places_BX, first_X1, ends_X, blocks, block_m, **of, B2=triton.next_power_of_2(blocks), num_warps=16
    )
    _put[(blocks,)](
        chosen_TK, places_BX, first_X1, ends_X, rows_A, expert_W, start_W, size_W, total, each, items, block_m, **of,
        SLICE=SLICE, ITEMS=triton.next_power_of_2(triton.cdiv(items, blocks)), num_warps=4,
    )  # fmt: skip
    return rows_A, expert_W, start_W, size_W, ends_X[-1:]
