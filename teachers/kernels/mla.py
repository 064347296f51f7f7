"""Decode attention over paged MLA latents, each latent read once for all heads and split over the sequence.

A program takes one row, one group of heads and one stretch of the row's tokens, with a running softmax; a second kernel
joins the stretches. Every product has the tokens or the latents as its long side, so that Hopper's warpgroup products
read a tile of latents where it lies in shared memory: once as keys, once, transposed, as values.

Shape legend: A rows, H heads, S splits, R latent rank, P rotary size, L page table width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers.kernels.chip import is_roomy


@dataclass
class Tiles:
    """Launch shapes: tokens a step, warps, pipeline stages, programs wanted in flight."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 132


TILES = Tiles()  # measured on an H100
SMALL_TILES = Tiles(block_n=32, num_stages=2)  # where there is less shared memory
MOST_SPLITS = 16
HEADS = 16  # that share a read of the latents: the short side of a product


@triton.jit
def _attend(
    query, pool, tables, lengths, mixed, sums, scale, table_stride, H, SPLITS, R: tl.constexpr, P: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = h < H
    r, p, n = tl.arange(0, R), tl.arange(0, P), tl.arange(0, BLOCK_N)
    length = tl.load(lengths + row) + 1  # the new token is in the cache already
    tiles = tl.cdiv(length, BLOCK_N)
    each = tl.cdiv(tiles, SPLITS)
    start, stop = split * each, tl.minimum(split * each + each, tiles)

    source = query + (row * H + h) * (R + P)
    content_HR = tl.load(source[:, None] + r[None, :], mask=heads[:, None], other=0.0)
    rotary_HP = tl.load(source[:, None] + R + p[None, :], mask=heads[:, None], other=0.0)
    content_RH, rotary_PH = tl.trans(content_HR), tl.trans(rotary_HP)
    best_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total_H = tl.zeros([BLOCK_H], tl.float32)
    mixed_RH = tl.zeros([R, BLOCK_H], tl.float32)
    for tile in tl.range(start, stop, num_stages=STAGES):
        first = tile * BLOCK_N
        page = tl.load(tables + row * table_stride + first // PAGE).to(tl.int64)
        at = pool + (page * PAGE + first % PAGE) * (R + P) + n[:, None] * (R + P)
        latent_NR = tl.load(at + r[None, :])
        key_NP = tl.load(at + R + p[None, :])
        score_NH = tl.dot(key_NP, rotary_PH, input_precision=PRECISION)
        score_NH = tl.dot(latent_NR, content_RH, score_NH, input_precision=PRECISION)
        score_NH = tl.where((first + n < length)[:, None], score_NH * scale, float("-inf"))
        new_H = tl.maximum(best_H, tl.max(score_NH, 0))
        weight_NH = tl.exp2(score_NH - new_H[None, :])
        shrink_H = tl.exp2(best_H - new_H)
        total_H = total_H * shrink_H + tl.sum(weight_NH, 0)
        mixed_RH = mixed_RH * shrink_H[None, :]
        mixed_RH = tl.dot(tl.trans(latent_NR), weight_NH.to(latent_NR.dtype), mixed_RH, input_precision=PRECISION)
        best_H = new_H

    if DIRECT:
        to = mixed + (row * H + h)[None, :] * R + r[:, None]
        tl.store(to, (mixed_RH / total_H[None, :]).to(mixed.dtype.element_ty), mask=heads[None, :])
    else:
        part = (row * SPLITS + split) * H + h
        safe_H = tl.where(total_H > 0, total_H, 1.0)
        tl.store(mixed + part[None, :] * R + r[:, None], mixed_RH / safe_H[None, :], mask=heads[None, :])
        tl.store(sums + part, tl.where(total_H > 0, best_H + tl.log2(safe_H), float("-inf")), mask=heads)


@triton.jit
def join(parts, sums, mixed, H, SPLITS: tl.constexpr, SPLITS2: tl.constexpr, R: tl.constexpr):
    row, h, r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, R)
    s = tl.arange(0, SPLITS2)
    logs = tl.load(sums + (row * SPLITS + s) * H + h, mask=s < SPLITS, other=float("-inf"))
    best = tl.max(logs, 0)
    total = tl.sum(tl.exp2(logs - best), 0)
    mixed_R = tl.zeros([R], tl.float32)
    for split in tl.static_range(SPLITS):
        part = (row * SPLITS + split) * H + h
        mixed_R += tl.exp2(tl.load(sums + part) - best) * tl.load(parts + part * R + r)
    tl.store(mixed + (row * H + h) * R + r, (mixed_R / total).to(mixed.dtype.element_ty))


@dataclass(frozen=True)
class Splits:
    """Where a decode step's programs leave what they mix: straight in `mixed`, or in parts that `join` adds up.

    mixed: [A, H, D] in the query's dtype. parts, sums: fp32 [A, count, H, D] and the log2 of their weights
    [A, count, H]; where one program reads a whole row (direct) both are `mixed`.
    """

    count: int
    mixed: Tensor
    parts: Tensor
    sums: Tensor

    @classmethod
    def of(cls, query: Tensor, heads: int, size: int, programs: int, groups: int) -> "Splits":
        """For A rows of `query` whose heads are read in so many groups, on about so many programs."""
        rows = len(query)
        count = max(1, min(MOST_SPLITS, programs // (rows * groups)))
        mixed = query.new_empty(rows, heads, size)
        if count == 1:
            return cls(count, mixed, mixed, mixed)
        parts = query.new_empty(rows, count, heads, size, dtype=torch.float32)
        return cls(count, mixed, parts, query.new_empty(rows, count, heads, dtype=torch.float32))

    @property
    def direct(self) -> bool:
        return self.count == 1

    def joined(self) -> Tensor:
        """`mixed`, once all programs have been launched."""
        if not self.direct:
            rows, heads, size = self.mixed.shape
            join[(rows, heads)](
                self.parts, self.sums, self.mixed, heads, SPLITS=self.count,
                SPLITS2=triton.next_power_of_2(self.count), R=size, num_warps=4,
            )  # fmt: skip
        return self.mixed


def mla_decode(query_AHL: Tensor, pool_GTL: Tensor, tables_AG: Tensor, lengths_A: Tensor, rank: int, scale: float):
    """Mixed latents [A, H, R] of one new token a row: softmax(scale * q . latents) over lengths_A + 1 cached tokens.

    query_AHL: [A, H, R + P], absorbed content and rotary parts. pool_GTL: [pages, page tokens, R + P].
    tables_AG: the pages of each row, in order.
    """
    rows, heads, size = query_AHL.shape
    page = pool_GTL.shape[1]
    tiles = TILES if is_roomy(query_AHL.device) else SMALL_TILES
    groups = triton.cdiv(heads, HEADS)
    splits = Splits.of(query_AHL, heads, rank, tiles.programs, groups)
    _attend[(rows, splits.count, groups)](
        query_AHL,
        pool_GTL,
        tables_AG,
        lengths_A,
        splits.parts,
        splits.sums,
        scale * 1.4426950408889634,
        tables_AG.stride(0),
        heads,
        splits.count,
        R=rank,
        P=size - rank,
        PAGE=page,
        BLOCK_H=HEADS,
        BLOCK_N=min(tiles.block_n, page),
        STAGES=tiles.num_stages,
        DIRECT=splits.direct,
        PRECISION="ieee" if query_AHL.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
    )
    return splits.joined()
