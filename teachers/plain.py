"""The teacher's operations in plain torch: what runs on a CPU, and what the kernels of teachers.kernels must equal.

Shape legend: T tokens, A rows, E hidden size, X experts, K experts a token, F width, H heads, Q query size, R latent
rank, P rotary size, L = R + P, G pages of a row.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from teachers.scaled import ScaledWeights


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
    if delta_TE is not None or experts_TKE is not None:
        total_TE = residual_TE.float()
        if delta_TE is not None:
            total_TE = total_TE + delta_TE.float()
        if experts_TKE is not None:
            routed_T1 = (torch.arange(len(total_TE), device=total_TE.device) < active_1).unsqueeze(1)
            total_TE = total_TE + torch.where(routed_T1, experts_TKE.float().sum(1), 0)
        residual_TE.copy_(total_TE)
    return rms_norm(residual_TE, weight_E, eps)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    x32_TE = x_TE.float()
    scale_T1 = torch.rsqrt(x32_TE.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * (x32_TE * scale_T1).to(x_TE.dtype)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up, [T, F], of the two halves side by side."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second = first.float(), second.float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
    rank, rotary = norm_weight_R.shape[0], query_THP.shape[2]
    cos_TP, sin_TP = (table[positions_T] for table in tables)
    query_THP.copy_(_rotated(source_THQ[..., -rotary:], cos_TP.unsqueeze(1), sin_TP.unsqueeze(1), interleaved))
    content_TR = rms_norm(latent_TL[:, :rank], norm_weight_R, eps)
    entry_TL = torch.cat((content_TR, _rotated(latent_TL[:, rank:], cos_TP, sin_TP, interleaved)), dim=-1)
    if latents_TL is not None:
        latents_TL.copy_(entry_TL)
    if pool_GTL is not None:
        pool_GTL.view(-1, pool_GTL.shape[-1])[slots_T] = entry_TL


def spread(source_TP: Tensor, target_THP: Tensor) -> None:
    """Writes what all heads share to each of them."""
    target_THP.copy_(source_TP.unsqueeze(1))


def mla_decode(query_AHL: Tensor, pool_GTL: Tensor, tables_AG: Tensor, lengths_A: Tensor, rank: int, scale: float):
    """Mixed latents [A, H, R] of one new token a row: softmax(scale * q . latents) over lengths_A + 1 cached tokens."""
    page = pool_GTL.shape[1]
    longest = int(lengths_A.max()) + 1
    latents_ATL = pool_GTL[tables_AG[:, : -(-longest // page)].long()].flatten(1, 2)[:, :longest]
    scores_AHT = torch.bmm(query_AHL * scale, latents_ATL.transpose(1, 2))
    visible_AT = torch.arange(longest, device=lengths_A.device) <= lengths_A.unsqueeze(1)
    scores_AHT.masked_fill_(~visible_AT.unsqueeze(1), float("-inf"))
    weights_AHT = F.softmax(scores_AHT, dim=-1, dtype=torch.float32).to(query_AHL.dtype)
    return torch.bmm(weights_AHT, latents_ATL[..., :rank])


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
    here = range(len(gate_XE)) if here is None else here
    scores_TX = F.linear(x_TE.float(), gate_XE.float()).sigmoid()
    choice_TX = scores_TX + bias_X
    if top_groups < groups:
        choice_TGX = choice_TX.unflatten(1, (groups, -1))
        open_TG = choice_TGX.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        closed_TG = torch.ones_like(choice_TGX[..., 0], dtype=torch.bool).scatter_(1, open_TG, False)
        choice_TX = choice_TGX.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(1)
    chosen_TK = choice_TX.topk(top_k, dim=-1).indices
    weight_TK = scores_TX.gather(1, chosen_TK)
    if normed:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    place_T = torch.arange(len(x_TE) // len(active_S), device=x_TE.device).repeat(len(active_S))
    idle_T1 = (place_T >= active_S.repeat_interleave(len(x_TE) // len(active_S))).unsqueeze(1)
    elsewhere_TK = (chosen_TK < here.start) | (chosen_TK >= here.stop) | idle_T1
    return (chosen_TK - here.start).masked_fill(elsewhere_TK, len(here)).int(), weight_TK * scale


def group(chosen_TK: Tensor, gate_up: Tensor, of: int | None = None) -> Tensor:
    """What `experts` takes: here the choices as they are."""
    return chosen_TK


def experts(
    x_TE: Tensor, chosen_TK: Tensor, weight_TK: Tensor, gate_up: Tensor | ScaledWeights, down: Tensor | ScaledWeights
) -> Tensor:
    """[T, K, E]: each choice's weight times its expert's output. gate_up: [X, 2F, E], down: [X, E, F]."""
    if isinstance(gate_up, ScaledWeights):
        gate_up, down = gate_up.widened(x_TE.dtype), down.widened(x_TE.dtype)
    tokens, top_k = chosen_TK.shape
    flat_A = chosen_TK.flatten().long()
    order_A = flat_A.argsort(stable=True)
    counts = torch.bincount(flat_A, minlength=len(gate_up)).tolist()
    out_AE = x_TE.new_zeros(tokens * top_k, x_TE.shape[1])
    parts = zip(order_A.split(counts)[: len(gate_up)], gate_up, down)
    for mine_B, up, back in parts:
        if len(mine_B):
            hidden_BF = silu_mul(F.linear(x_TE[mine_B // top_k], up))
            out_AE[mine_B] = F.linear(hidden_BF, back) * weight_TK.flatten()[mine_B].unsqueeze(1).to(x_TE.dtype)
    return out_AE.view(tokens, top_k, -1)


def combine(out_TKE: Tensor, chosen_TK: Tensor, experts: int) -> Tensor:
    """[T, E]: the sum of each token's outputs, without those of choices that are none of the `experts`."""
    return out_TKE.float().masked_fill((chosen_TK >= experts).unsqueeze(-1), 0).sum(1).to(out_TKE.dtype)


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
    cos_T1D, sin_T1D = (table[positions_T].unsqueeze(1) for table in tables)
    query_THD, key_TKD = heads_TXD[:, : -2 * kv_heads], heads_TXD[:, -2 * kv_heads : -kv_heads]
    for i, part in enumerate((query_THD, key_TKD)):
        normed = part if norms_2D is None else rms_norm(part, norms_2D[i], eps)
        part.copy_(_rotated(normed, cos_T1D, sin_T1D, False))
    if pool_GTL is not None:
        pool_GTL.view(-1, pool_GTL.shape[-1])[slots_T.long()] = heads_TXD[:, -2 * kv_heads :].flatten(1)


def gqa_decode(
    query_AHD: Tensor, pool_GTL: Tensor, tables_AG: Tensor, lengths_A: Tensor, kv_heads: int, scale: float
) -> Tensor:
    """[A, H, D] of one new token a row: softmax(scale * q . k) v over lengths_A + 1 cached tokens.

    pool_GTL: [pages, page tokens, 2 K D], the keys of K heads, then their values. Query head h reads head h K // H.
    """
    page, longest = pool_GTL.shape[1], int(lengths_A.max()) + 1
    entries_AT = pool_GTL[tables_AG[:, : -(-longest // page)].long()].flatten(1, 2)[:, :longest]
    key_AKTD, value_AKTD = entries_AT.unflatten(2, (2, kv_heads, -1)).permute(2, 0, 3, 1, 4)
    query_AKRD = query_AHD.unflatten(1, (kv_heads, -1)) * scale
    scores_AKRT = query_AKRD @ key_AKTD.transpose(-1, -2)
    visible_AT = torch.arange(longest, device=lengths_A.device) <= lengths_A.unsqueeze(1)
    scores_AKRT.masked_fill_(~visible_AT[:, None, None], float("-inf"))
    weights_AKRT = F.softmax(scores_AKRT, dim=-1, dtype=torch.float32).to(query_AHD.dtype)
    return (weights_AKRT @ value_AKTD).flatten(1, 2)


def attend_ragged(query_THD: Tensor, key_SKD: Tensor, value_SKD: Tensor, ragged, scale: float) -> Tensor:
    """Causal attention [T, H, D] of each sequence's new tokens, its last ones, over all of its tokens.

    ragged: `new` and `whole`, the tokens of each sequence in T and in S (teachers.dense.Ragged).
    """
    sizes = list(zip(ragged.new, ragged.whole))
    mixed, first, first_whole = [], 0, 0
    for (new, whole), same in groupby(sizes):  # sequences of the same lengths in one call
        count = len(list(same))
        query = query_THD[first : first + count * new].unflatten(0, (count, new)).transpose(1, 2)
        stretch = slice(first_whole, first_whole + count * whole)
        key, value = (part[stretch].unflatten(0, (count, whole)).transpose(1, 2) for part in (key_SKD, value_SKD))
        mask = None if new == whole else causal_lower_right(new, whole)
        gqa = query.shape[1] != key.shape[1]
        values = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        mixed.append(values.transpose(1, 2).flatten(0, 1))
        first, first_whole = first + count * new, first_whole + count * whole
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
