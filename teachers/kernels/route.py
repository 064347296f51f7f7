"""Routing: the choice of experts of every token, by a router in fp32.

Shape legend: T tokens, E hidden size, X experts, K experts a token, S parts of the router's product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

SMALL_STEP = 512  # tokens of a decode step, where a kernel's latency counts more than its work
ROUTER_ROWS, ROUTER_PARTS = 16, 8  # a decode step splits the router's product over its inputs


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
    parts, bias, chosen, weights, active, T, EACH, FIRST, COUNT, scale, PARTS: tl.constexpr, X: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMED: tl.constexpr, AT_ONCE: tl.constexpr,
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
    # EACH rows of every share, of which it has `active`; experts are numbered from the first that answers here.
    here = (t % EACH < tl.load(active + t // EACH)) & (x >= FIRST) & (x < FIRST + COUNT)
    ids = tl.where(here, x - FIRST, COUNT)
    tl.store(chosen + t * K + place, ids, mask=mine)
    tl.store(weights + t * K + place, scores * scale, mask=mine)


def route(
    x_TE: Tensor,
    gate_XE: Tensor,
    bias_X: Tensor,
    active_S: Tensor,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    normed: bool,
    scale: float,
    here: range | None = None,
) -> tuple[Tensor, Tensor]:
    """Expert ids (int32) and weights (fp32) [T, K]; rows from active_S on get the id X, which no expert has.

    here: the experts of this rank, numbered from 0; the others are no experts either. active_S: where tokens are those
    of S shares, as many of each, the rows of every share that are active.
    """
    tokens, experts = x_TE.shape[0], gate_XE.shape[0]
    here = range(experts) if here is None else here
    chosen_TK = torch.empty(tokens, top_k, dtype=torch.int32, device=x_TE.device)
    weight_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=x_TE.device)
    parts_STX = _router_logits(x_TE, gate_XE)
    _choose[(tokens,)](
        parts_STX,
        bias_X,
        chosen_TK,
        weight_TK,
        active_S,
        tokens,
        tokens // len(active_S),
        here.start,
        len(here),
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
