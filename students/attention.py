"""Causal attention inside each trace of a packed row, as an attention function of transformers.

Traces lie one behind the other in ONE sequence of N tokens; seq_lens says where each ends. Attention runs on each trace
by itself, so no mask is built, no token is padding and nothing can leak from one trace into another.

Shape legend: N tokens of all traces together, A query heads, G key-value heads, D head width.
"""

from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from students.packed_operator import NEVER, filling_of, packed_scaled_dot_product
from students.sequence import RowRanks

NAME = "packed_causal"
LONG = 1024  # tokens of a trace from which on cuDNN is faster for it alone than flash attention for several
WIDEST_HEAD = 128  # of cuDNN's backward pass


def packed_attention(
    module: torch.nn.Module,
    query_1AND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    attention_mask: None,
    *,
    seq_lens: list[int] | None = None,
    seq_ends: torch.Tensor | None = None,
    device_ends: torch.Tensor | None = None,
    alone_from: int = NEVER,
    scaling: float | None = None,
    row_ranks: RowRanks | None = None,
    filling: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """([1, N, A, D], None): softmax(q k^T * scaling) v over the tokens of the same trace up to the query's own.

    seq_lens: tokens of each trace, in order; they sum to N. None: all are one trace. seq_ends: int32 on the host, their
    running sum with a leading 0, and device_ends, the same on the device, given where one operator serves all traces
    (CUDA, half precision), those of alone_from tokens and more one by one; elsewhere each trace is one
    scaled_dot_product_attention. row_ranks: where several ranks share the row, which then give and get N / ranks tokens
    each. filling: tokens put behind a single trace for the kernel's sake (`filling_of`).
    """
    if row_ranks is not None:
        query_1AND, key_1GND, value_1GND = row_ranks.heads(query_1AND, key_1GND, value_1GND)
    if seq_ends is not None:
        out_1NAD = _one_operator(query_1AND, key_1GND, value_1GND, seq_ends, device_ends, alone_from, scaling)
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
        ends = running_ends(seq_lens)
        return {"seq_ends": ends, "device_ends": ends.to(device), "alone_from": _alone_from(device)}
    return {"seq_lens": seq_lens}


def running_ends(seq_lens: list[int]) -> torch.Tensor:
    """seq_ends for these lengths."""
    return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32)


@cache
def _alone_from(device: torch.device) -> int:
    hopper = torch.cuda.get_device_capability(device)[0] == 9  # the generation it was measured on
    return LONG if hopper and torch.backends.cuda.cudnn_sdp_enabled() else NEVER


def _each_alone(
    query_1AND: torch.Tensor, key_1GND: torch.Tensor, value_1GND: torch.Tensor, lens: list[int], scaling: float | None
) -> torch.Tensor:
    gqa = query_1AND.shape[1] != key_1GND.shape[1]
    parts = zip(query_1AND.split(lens, 2), key_1GND.split(lens, 2), value_1GND.split(lens, 2))
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=gqa) for part in parts]
    return (torch.cat(out, 2) if len(out) > 1 else out[0]).transpose(1, 2).contiguous()


def _one_operator(
    query_1AND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    ends: torch.Tensor,
    device_ends: torch.Tensor,
    alone_from: int,
    scaling: float | None,
) -> torch.Tensor:
    query, key, value = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query_1AND, key_1GND, value_1GND))
    width = query.shape[2]
    alone_from = alone_from if width <= WIDEST_HEAD else NEVER
    scaling = width**-0.5 if scaling is None else scaling
    return packed_scaled_dot_product(query, key, value, ends, device_ends, alone_from, scaling)[0][None]


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
