"""How likely whole stretches of text are to teacher and student: for text that the teacher did not sample.

Between two boundaries that both tokenizations have lies one chunk of bytes, whatever tokens either cuts it into. Each
model says how likely it is that the text goes on with it; that yes or no is a Bernoulli variable on both sides:

    loss_C = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),  q = P_teacher(chunk)^(1/t), p = P_student(chunk)^(1/t)

It is 0 where both agree, and unlike the cross-entropy of a sampled token it is right for any text: a human's, or what
the student wrote itself. Binarised likelihood matching, Minixhofer, Vulic and Ponti 2025.

Shape legend: N tokens, C chunks.
"""

import math

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


def _below_zero(log_C: Tensor) -> Tensor:
    """A certain chunk as one that is as good as certain: the other outcome's logarithm must stay finite."""
    return log_C.clamp(max=-torch.finfo(log_C.dtype).eps)


def _log1mexp(log_C: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012)."""
    near_C = log_C > -math.log(2)
    # Each branch sees arguments that are harmless to it, so that no NaN of the other comes back through the gradient.
    small_C, large_C = torch.where(near_C, log_C, -1.0), torch.where(near_C, -1.0, log_C)
    return torch.where(near_C, torch.log(-torch.expm1(small_C)), torch.log1p(-torch.exp(large_C)))
