"""How likely whole stretches of text are to teacher and student: for text that the teacher did not sample.

Between two boundaries that both tokenizations have lies one chunk of bytes, whatever tokens either cuts it into. Each
model says how likely it is that the text goes on with it; that yes or no is a Bernoulli variable on both sides:

    loss_C = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),  q = P_teacher(chunk)^(1/t), p = P_student(chunk)^(1/t)

It is 0 where both agree, and unlike the cross-entropy of a sampled token it is right for any text: a human's, or what
the student wrote itself. Binarised likelihood matching, Minixhofer, Vulic and Ponti 2025.

In the fused loss a chunk's tokens may be far apart, and the loss is no sum over them. It enters as its tangent at the
student as it is: weights of their cross-entropies, and constants, with the value and the gradient of the loss.

Shape legend: N tokens, C chunks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def chunk_logprobs(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """[C]: the log-probability of each chunk, the sum over its tokens. chunk_N: int64, the chunk of each token."""
    return logp_N.new_zeros(chunks).index_add(0, chunk_N, logp_N)


def chunk_divergence(teacher_C: Tensor, student_C: Tensor, temperature: float = 1.0) -> Tensor:
    """[C], nats, of log-probabilities of chunks; gradients go to the student's."""
    q_C, p_C = teacher_C / temperature, _below_zero(student_C / temperature)
    no_C = _log1mexp(_below_zero(q_C))
    yes_part_C = q_C.exp() * (q_C - p_C)
    return yes_part_C + torch.where(q_C < 0, no_C.exp() * (no_C - _log1mexp(p_C)), 0)


def tangent(
    logp_N: Tensor, chunk_N: Tensor, teacher_N: Tensor, add_up: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(slope_N, offset_N): slope * cross-entropy + offset, summed over the tokens, has the value and the gradient of
    the sum of chunk_divergence over the chunks.

    logp_N: the student's log-probability of each token. chunk_N: int64, equal for the tokens of a chunk, -1 for tokens
    of none, whose slope and offset are 0. teacher_N: the teacher's log-probability of each token's chunk.
    add_up: where tokens of a chunk lie on other ranks too: given the chunks' numbers and [C, 2] sums over the tokens
    here, it returns those over all ranks. The sums over tokens, of value and gradient, are then over all ranks as well.
    """
    inside = (chunk_N >= 0).nonzero().squeeze(1)
    names, chunk_I = chunk_N[inside].unique(return_inverse=True)
    chunks, logp_I = len(names), logp_N[inside]
    teacher_C = logp_N.new_zeros(chunks).index_copy(0, chunk_I, teacher_N[inside].to(logp_N.dtype))
    student_C, sizes_C = (chunk_logprobs(x_I, chunk_I, chunks) for x_I in (logp_I, torch.ones_like(logp_I)))
    if add_up is not None:
        student_C, sizes_C = add_up(names, torch.stack([student_C, sizes_C], 1)).unbind(1)
    value_C = chunk_divergence(teacher_C, student_C)
    # How far a chunk is from certain is known to the rounding of its logarithm alone; the slope divides by it.
    nearest = -(torch.finfo(logp_N.dtype).eps ** 0.5)
    with torch.enable_grad():
        at_C = student_C.detach().clamp(max=nearest).requires_grad_()
        (grad_C,) = torch.autograd.grad(chunk_divergence(teacher_C, at_C).sum(), at_C)
    slope_N, offset_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    slope_N[inside] = -grad_C[chunk_I]
    offset_N[inside] = (value_C / sizes_C)[chunk_I] + slope_N[inside] * logp_I
    return slope_N, offset_N


def _below_zero(log_C: Tensor) -> Tensor:
    """A certain chunk as one that is as good as certain: the other outcome's logarithm must stay finite."""
    return log_C.clamp(max=-torch.finfo(log_C.dtype).eps)


def _log1mexp(log_C: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    near_C = log_C > -math.log(2)
    # Each branch sees arguments that are harmless to it, so that no NaN of the other comes back through the gradient.
    small_C, large_C = torch.where(near_C, log_C, -1.0), torch.where(near_C, -1.0, log_C)
    return torch.where(near_C, torch.log(-torch.expm1(small_C)), torch.log1p(-torch.exp(large_C)))
