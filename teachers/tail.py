"""Draws from the tails of distributions that a kernel left packed on the GPU (distill.sampling.draw_tail).

Rare, and so in plain operations of torch: a pass in float64 over every row's vocabulary. They neither wait for the
device nor depend on the host, so that a recorded step can hold them.

Shape legend: A rows, V vocabulary, K entries of a support, N draws.
"""

import torch
from torch import Tensor

from distill.sampling import StepLogits, Support, draw_tail

HEADER = 4  # token, entries, tail mass, logsumexp: teachers.kernels.draw


def support_of(packed_AW: Tensor) -> Support:
    """Views of the packed result [A, 4 + 2K] of teachers.kernels.draw, on any device."""
    k, floats_AW = (packed_AW.shape[1] - HEADER) // 2, packed_AW.view(torch.float32)
    ids_AK, logprobs_AK = packed_AW[:, HEADER : HEADER + k], floats_AW[:, HEADER + k :]
    return Support(ids_AK, logprobs_AK, packed_AW[:, 1], floats_AW[:, 2], floats_AW[:, 3])


def with_draws(packed_AW: Tensor, logits_AV: Tensor, draws: int, draws_A: Tensor | None = None) -> Tensor:
    """The packed result [A, 4 + 2 (K + draws)] with the tail drawn from: `draws` times, or draws_A each."""
    found = draw_tail(StepLogits(logits_AV), support_of(packed_AW), draws, draws_A=draws_A)
    bits = lambda floats_A: floats_A.view(torch.int32)  # noqa: E731
    stored_AK = found.logprobs_AK > -torch.inf  # what pads a support is zero, as the kernel leaves it
    parts = (
        packed_AW[:, :1],
        found.count_A.unsqueeze(1),
        bits(found.tail_A.unsqueeze(1)),
        packed_AW[:, 3:HEADER],
        found.ids_AK * stored_AK,
        bits(torch.where(stored_AK, found.logprobs_AK, 0.0)),
    )
    return torch.cat(parts, dim=1)
