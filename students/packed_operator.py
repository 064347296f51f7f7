"""Causal attention inside each trace of a packed row, as ONE operator that neither a compiler nor recomputation opens.

Each long trace goes to cuDNN by itself, some of them at a time: on Hopper it is twice as fast as flash attention 2, but
torch prepares what it has for several lengths at once anew for every call, for 80 ms. Neighbouring short traces go
together to flash attention's variable-length kernel. All read the row where it lies; no key or value is repeated.

cuDNN prepares for every new length too, so a trace is filled up to one of few. The filling is what lies behind the
trace, usually the next trace. No query of the trace sees it; its own queries get no say in the gradients, because the
log-sum-exp that the backward pass is told of them is infinite: their weights, exp(score - inf), are exactly 0.

Shape legend: N tokens of a row, T1 its traces + 1, L tokens of one trace, F the same filled up, A query heads,
G key-value heads, D head width, H either number of heads.
"""

from collections.abc import Callable
from functools import cache
from itertools import cycle, groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 4  # parts of a row that a GPU works on at a time
NEVER = 1 << 40  # alone_from of a device where flash attention is the best for every length


class Part(NamedTuple):
    """Traces [first, last) of a row. alone: it is one long trace."""

    first: int
    last: int
    alone: bool


# Its name makes selective recomputation keep its output, as that of torch's own attention (students.layers.ATTENTION).
@torch.library.custom_op("distill::packed_scaled_dot_product", mutates_args=())
def packed_scaled_dot_product(
    query_NAD: Tensor, key_NGD: Tensor, value_NGD: Tensor, ends_T1: Tensor, device_ends_T1: Tensor, alone_from: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(softmax(q k^T * scale) v [N, A, D], the log-sum-exp of every query's scores, float [N, A]).

    ends_T1: int32 on the HOST, a leading 0 and the running sum of the lengths: read without waiting
    for the device, and as a tensor it does not make a compiled layer compile anew. device_ends_T1: the same on the
    device. alone_from: tokens from which on a trace goes to cuDNN.
    """
    ends = ends_T1.tolist()
    tensors = tuple(x.contiguous() for x in (query_NAD, key_NGD, value_NGD))

    def attend(part: Part) -> tuple[Tensor, Tensor]:
        start, stop = ends[part.first], ends[part.last]
        if part.alone:
            out_1AFD, sums_1AF = _attention(*(_filled(x, start, stop) for x in tensors), scale)
            return out_1AFD.transpose(1, 2)[0, : stop - start], sums_1AF[0, :, : stop - start].T
        out_LAD, sums_AL = _varlen(*(x[start:stop] for x in tensors), *_ends_within(part, ends, device_ends_T1), scale)
        return out_LAD, sums_AL.T

    return _side_by_side(attend, _parts(ends, alone_from), ends, lambda: _outputs(query_NAD))


@torch.library.custom_op("distill::packed_scaled_dot_product_backward", mutates_args=())
def packed_scaled_dot_product_backward(
    grad_NAD: Tensor, query_NAD: Tensor, key_NGD: Tensor, value_NGD: Tensor, out_NAD: Tensor, sums_NA: Tensor,
    ends_T1: Tensor, device_ends_T1: Tensor, alone_from: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, from that of the output, with what the operator was given and gave."""
    ends = ends_T1.tolist()
    tensors = tuple(x.contiguous() for x in (grad_NAD, query_NAD, key_NGD, value_NGD, out_NAD))

    def attend(part: Part) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = ends[part.first], ends[part.last]
        sums_AL = sums_NA[start:stop].T
        if not part.alone:
            given = (*(x[start:stop] for x in tensors), sums_AL.contiguous())
            return _varlen_backward(*given, *_ends_within(part, ends, device_ends_T1), scale)
        sums_1AF = F.pad(sums_AL.contiguous(), (0, filling_of(stop - start)), value=torch.inf)[None]
        found = _attention_backward(*(_filled(x, start, stop) for x in tensors), sums_1AF, scale)
        return tuple(x_1HFD.transpose(1, 2)[0, : stop - start] for x_1HFD in found)

    return _side_by_side(attend, _parts(ends, alone_from), ends, lambda: _gradients(*tensors))


@packed_scaled_dot_product.register_fake
def _outputs(query_NAD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """What the operator returns, with any values."""
    sums = query_NAD.new_empty(query_NAD.shape[:2], dtype=torch.promote_types(query_NAD.dtype, torch.float32))
    return query_NAD.new_empty(query_NAD.shape), sums


@packed_scaled_dot_product_backward.register_fake
def _gradients(_grad: Tensor, *inputs: object) -> tuple[Tensor, ...]:
    """What its backward pass returns, with any values."""
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.alone_from, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_NAD: Tensor, _grad_of_sums: Tensor):
    query, key, value, ends, device_ends, out, sums = ctx.saved_tensors
    given = (grad_NAD, query, key, value, out, sums, ends, device_ends, ctx.alone_from, ctx.scale)
    return *packed_scaled_dot_product_backward(*given), None, None, None, None


packed_scaled_dot_product.register_autograd(_backward, setup_context=_keep)


def filling_of(tokens: int) -> int:
    """Tokens that bring a row onto a grid of 16 lengths an octave, at most a sixteenth of it from 2048 on.

    cuDNN, the fastest kernel for one trace, takes up to a second to prepare for a length that it has not seen. No token
    of a causal trace sees what is put behind it.
    """
    return -tokens % max(128, 1 << max(tokens.bit_length() - 5, 0))


def _parts(ends: list[int], alone_from: int) -> list[Part]:
    lengths, found = [stop - start for start, stop in pairwise(ends)], []
    for alone, run in groupby(range(len(lengths)), lambda i: lengths[i] >= alone_from):
        traces = list(run)
        found += [Part(i, i + 1, True) for i in traces] if alone else [Part(traces[0], traces[-1] + 1, False)]
    return found


def _side_by_side(
    work: Callable[[Part], tuple[Tensor, ...]], parts: list[Part], ends: list[int], new: Callable[[], tuple]
) -> tuple[Tensor, ...]:
    """work(part) of all parts, one behind the other, in what `new` makes: tensors whose first dimension is the row's.

    A single trace does not fill a GPU, so what one part launches may run beside the next's; whatever the current stream
    does afterwards waits for all. The other streams' memory needs no record of its use: it is used there alone.
    """
    if len(parts) == 1:
        return tuple(x.contiguous() for x in work(parts[0]))
    whole = new()
    device = whole[0].device
    lanes = _streams(device)[: len(parts)] if device.type == "cuda" else [None]
    for lane in filter(None, lanes):
        lane.wait_stream(torch.cuda.current_stream(device))
    try:
        for part, lane in zip(parts, cycle(lanes)):
            with torch.cuda.stream(lane):  # None changes nothing
                for all_of_it, found in zip(whole, work(part)):
                    all_of_it[ends[part.first] : ends[part.last]] = found
    finally:  # after an error too: what they write to is free as soon as this returns
        for lane in filter(None, lanes):
            torch.cuda.current_stream(device).wait_stream(lane)
    return whole


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(LANES)]


def _filled(x_NHD: Tensor, start: int, stop: int) -> Tensor:
    """[1, H, F, D]: the trace and what lies behind it, a view unless the row ends too early.

    Its strides follow from its shape alone; they are part of what cuDNN prepares for.
    """
    tokens = stop - start + filling_of(stop - start)
    row, heads, width = x_NHD.shape
    if start + tokens > row:
        x_NHD, start = F.pad(x_NHD[start:], (0, 0, 0, 0, 0, start + tokens - row)), 0
    token = heads * width
    return x_NHD.as_strided(
        (1, heads, tokens, width), (tokens * token, width, token, 1), x_NHD.storage_offset() + start * token
    )


def _ends_within(part: Part, ends: list[int], device_ends_T1: Tensor) -> tuple[Tensor, int]:
    """(the running ends of the part's traces from its own start, the longest of them)."""
    first, last, _ = part
    within = device_ends_T1[first : last + 1]
    longest = max(stop - start for start, stop in zip(ends[first:last], ends[first + 1 :]))
    return (within - ends[first] if first else within), longest


def _attention(query_1AFD: Tensor, key_1GFD: Tensor, value_1GFD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [1, A, F, D], log-sum-exp [1, A, F]) of one causal trace."""
    given = (query_1AFD, key_1GFD, value_1GFD)
    if query_1AFD.is_cuda:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, None, True, 0.0, True, scale=scale)
        return found[0], found[1].squeeze(-1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, True, scale=scale)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    given, tokens = (grad, query, key, value, out), query.shape[2]
    if not query.is_cuda:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(*given, sums, 0.0, True, scale=scale)
    given = (*given, sums.unsqueeze(-1))
    no_dropout = torch.empty((), dtype=torch.int64, device=query.device)  # where a random state would be
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(*given, no_dropout, no_dropout, None, None, None, tokens, tokens, 0.0, True, scale=scale)


def _varlen(
    query_LAD: Tensor, key_LGD: Tensor, value_LGD: Tensor, ends_T1: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [L, A, D], log-sum-exp [A, L]) of several traces, L tokens together."""
    given = (query_LAD, key_LGD, value_LGD)
    if query_LAD.is_cuda:
        lengths = (ends_T1, ends_T1, longest, longest)
        return torch.ops.aten._flash_attention_forward(*given, *lengths, 0.0, True, False, scale=scale)[:2]
    parts = zip(*(_traces(x, ends_T1) for x in given))
    outs, sums = zip(*(_attention(*part, scale) for part in parts))
    return torch.cat(outs, 2)[0].transpose(0, 1), torch.cat(sums, 2)[0]


def _varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums_AL: Tensor, ends_T1: Tensor,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (grad, query, key, value, out)
    if query.is_cuda:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
        lengths = (ends_T1, ends_T1, longest, longest)
        backward = torch.ops.aten._flash_attention_backward
        return backward(*given, sums_AL, *lengths, 0.0, True, no_dropout, no_dropout, scale=scale)
    parts = zip(*(_traces(x, ends_T1) for x in given), sums_AL.tensor_split(ends_T1[1:-1].tolist(), 1))
    found = [_attention_backward(*part[:5], part[5][None], scale) for part in parts]
    return tuple(torch.cat(each, 2)[0].transpose(0, 1) for each in zip(*found))


def _traces(x_LHD: Tensor, ends_T1: Tensor) -> list[Tensor]:
    """[1, H, l, D] of each trace."""
    return [x_lHD[None].transpose(1, 2) for x_lHD in x_LHD.tensor_split(ends_T1[1:-1].tolist())]
