"""Causal attention inside each trace of a packed row, as an attention function of transformers.

Traces lie one behind the other in ONE sequence of N tokens; seq_lens says where each ends. Attention runs on each trace
by itself, so no mask is built, no token is padding and nothing can leak from one trace into another.

Shape legend: N tokens of all traces together, A query heads, G key-value heads, D head width.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from students.sequence import RowRanks

NAME = "packed_causal"


def packed_attention(
    module: torch.nn.Module,
    query_1AND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    attention_mask: None,
    *,
    seq_lens: list[int] | None = None,
    seq_ends: torch.Tensor | None = None,
    longest: int = 0,
    scaling: float | None = None,
    row_ranks: RowRanks | None = None,
    filling: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """([1, N, A, D], None): softmax(q k^T * scaling) v over the tokens of the same trace up to the query's own.

    seq_lens: tokens of each trace, in order; they sum to N. None: all are one trace. seq_ends: int32, their running sum
    with a leading 0, given with the longest length where one variable-length kernel serves (CUDA, half precision);
    elsewhere each trace is one scaled_dot_product_attention. row_ranks: where several ranks share the row, which then
    give and get N / ranks tokens each. filling: tokens put behind a single trace for the kernel's sake (`filling_of`).
    """
    if row_ranks is not None:
        query_1AND, key_1GND, value_1GND = row_ranks.heads(query_1AND, key_1GND, value_1GND)
    if seq_ends is not None:
        out_1NAD = _one_kernel(query_1AND, key_1GND, value_1GND, longest, seq_ends, scaling)
    elif filling:
        tokens = query_1AND.shape[2]
        filled = (F.pad(x, (0, 0, 0, filling)) for x in (query_1AND, key_1GND, value_1GND))
        out_1NAD = _each_alone(*filled, [tokens + filling], scaling)[:, :tokens]
    else:
        out_1NAD = _each_alone(query_1AND, key_1GND, value_1GND, seq_lens or [query_1AND.shape[2]], scaling)
    return (out_1NAD if row_ranks is None else row_ranks.tokens(out_1NAD)), None


def how_packed(seq_lens: list[int], device: torch.device, dtype: torch.dtype) -> dict:
    """What packed_attention is told of a row, made once a micro-batch. No list reaches a compiled layer: it would be
    compiled anew for every row."""
    kernels = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if len(seq_lens) == 1:
        return {"filling": filling_of(seq_lens[0])} if kernels else {}
    if kernels:
        return {"seq_ends": running_ends(seq_lens, device), "longest": max(seq_lens)}
    return {"seq_lens": seq_lens}


def filling_of(tokens: int) -> int:
    """Tokens that bring a row onto a grid of 16 lengths an octave, at most a sixteenth of it from 2048 on.

    cuDNN, the fastest kernel for one trace, takes up to a second to prepare for a length that it has not seen. No token
    of a causal trace sees what is put behind it.
    """
    return -tokens % max(128, 1 << max(tokens.bit_length() - 5, 0))


def running_ends(seq_lens: list[int], device: torch.device) -> torch.Tensor:
    """seq_ends for these lengths."""
    return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32, device=device)


def _each_alone(
    query_1AND: torch.Tensor, key_1GND: torch.Tensor, value_1GND: torch.Tensor, lens: list[int], scaling: float | None
) -> torch.Tensor:
    gqa = query_1AND.shape[1] != key_1GND.shape[1]
    parts = zip(query_1AND.split(lens, 2), key_1GND.split(lens, 2), value_1GND.split(lens, 2))
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=gqa) for part in parts]
    return (torch.cat(out, 2) if len(out) > 1 else out[0]).transpose(1, 2).contiguous()


def _one_kernel(
    query_1AND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    longest: int,
    ends: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query_1AND, key_1GND, value_1GND))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # older torch has no enable_gqa here; repeating costs little beside the attention itself
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out_NAD = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    return out_NAD[None]


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
