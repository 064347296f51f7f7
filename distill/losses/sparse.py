"""Divergences against a sparse teacher: K stored tokens and one outcome for everything else.

The teacher is known on its support only, plus the exact mass T outside it. Both sides are reduced to K+1 outcomes, the
K tokens and "the rest", and compared by the dense formulas. Nothing is renormalised over K: a student that leaks mass
out of the support pays for it. With the whole vocabulary as support the rest is empty and the loss is the dense one.

In logits: y = (z_1 .. z_K, logsumexp of all other z), so softmax(y) is the student on the K+1 outcomes. The gradient
to z is that to y_k on the support, and q_j times that to the rest elsewhere, q the student's distribution within the
rest. This form never divides by the student's tail mass, so a tail of 1e-30 or of nothing is as exact as any other.

A temperature is applied to the K+1 outcomes (how the teacher spreads its mass inside the rest is not stored).

Shape legend: N tokens, V vocabulary, K support entries (padded), K1 = K + 1 outcomes, the rest last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import DataError
from distill.losses.divergence import LOG_ZERO, check_settings, dense_divergence

# Stored log-probabilities are rounded to a few hundredths of a nat; a sum further from 1 is no rounding.
MASS_TOLERANCE = 0.05


@dataclass(frozen=True)
class SparseTargets:
    """Teacher distributions on a support, at temperature 1.

    ids_NK: int64 token ids, distinct within a row; any value where padded. logprobs_NK: log-probabilities, -inf where
    padded. tail_N: mass outside the support, >= 0. A row of padding alone (tail 1) says nothing: zero divergence, zero
    gradient.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor

    @property
    def padded_NK(self) -> Tensor:
        """Where a row has no token: bool [N, K]."""
        return self.logprobs_NK == -torch.inf

    def rows(self, index: Tensor | slice) -> "SparseTargets":
        """The targets of the tokens in `index` (int64 [n], or a slice: no copy)."""
        return SparseTargets(self.ids_NK[index], self.logprobs_NK[index], self.tail_N[index])

    def to(self, device: torch.device | str) -> "SparseTargets":
        return SparseTargets(self.ids_NK.to(device), self.logprobs_NK.to(device), self.tail_N.to(device))

    def check(self, vocab_size: int, *, distinct: bool = True) -> None:
        """Raise DataError, naming the token, for ids outside the vocabulary or repeated, or masses that do not sum
        to 1."""
        shape, pad_NK = tuple(self.ids_NK.shape), self.logprobs_NK == -torch.inf
        if self.logprobs_NK.shape != shape or len(shape) != 2 or self.tail_N.shape != shape[:1]:
            found = (shape, tuple(self.logprobs_NK.shape), tuple(self.tail_N.shape))
            raise DataError(
                "ids, logprobs and tail do not fit together",
                where="SparseTargets",
                value=found,
                remedy="Give [N,K], [N,K], [N].",
            )
        outside_N = (((self.ids_NK < 0) | (self.ids_NK >= vocab_size)) & ~pad_NK).any(1)
        _raise_first(
            outside_N,
            f"a teacher token is outside the student's {vocab_size} tokens",
            "Align the cache to this tokenizer.",
        )
        mass_N = self.logprobs_NK.double().exp().sum(1) + self.tail_N
        wrong_N = ~((mass_N - 1).abs() <= MASS_TOLERANCE) | ~(self.tail_N >= 0)
        _raise_first(
            wrong_N, "teacher masses and tail do not sum to 1", "Store true log-probabilities and the exact tail mass."
        )
        if distinct:
            free_NK = -1 - torch.arange(shape[1], device=self.ids_NK.device)
            ordered_NK = torch.where(pad_NK, free_NK, self.ids_NK).sort(1).values
            _raise_first(
                (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(1), "a token is twice in a support", "Merge its masses."
            )


def _raise_first(bad_N: Tensor, what: str, remedy: str) -> None:
    if bool(bad_N.any()):
        raise DataError(what, where=f"SparseTargets row {int(bad_N.nonzero()[0])}", remedy=remedy)


def teacher_logits(targets: SparseTargets, dtype: torch.dtype) -> Tensor:
    """log-masses [N, K1] of the teacher, the rest last; LOG_ZERO where padded or where the mass is 0."""
    tail_N1 = targets.tail_N.to(dtype).log().unsqueeze(1)
    return torch.cat([targets.logprobs_NK.to(dtype), tail_N1], 1).clamp_(min=LOG_ZERO)


def mask_support_(logits_NV: Tensor, targets) -> tuple[Tensor, Tensor]:
    """(logits of the support [N, K] with LOG_ZERO at padding, ids [N, K] safe to scatter to); logits_NV loses the
    support.

    A padded id is replaced by the first real one of its row, so that every write of a row agrees; a row without any
    real one writes back what was there.
    """
    pad_NK = targets.padded_NK
    if pad_NK.shape[1] == 0:
        return logits_NV.new_empty(pad_NK.shape), targets.ids_NK
    empty_N1 = pad_NK.all(1, keepdim=True)
    first_N1 = targets.ids_NK.gather(1, pad_NK.int().argmin(1, keepdim=True)).masked_fill(empty_N1, 0)
    ids_NK = torch.where(pad_NK, first_N1, targets.ids_NK)
    support_NK = logits_NV.gather(1, ids_NK)
    logits_NV.scatter_(1, ids_NK, support_NK.masked_fill(~empty_N1, LOG_ZERO))
    return support_NK.masked_fill(pad_NK, LOG_ZERO), ids_NK


def outcome_logits(logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """y [N, K1]: the student's logits on the K+1 outcomes, softmax(y) = (p_1 .. p_K, mass of the rest); keeps the
    graph."""
    rest_NV = logits_NV.clone()
    with torch.no_grad():
        _, ids_NK = mask_support_(rest_NV.detach(), targets)
        masked_NV = rest_NV.detach() <= LOG_ZERO / 2
    support_NK = logits_NV.gather(1, ids_NK).masked_fill(targets.logprobs_NK == -torch.inf, LOG_ZERO)
    rest_N1 = torch.logsumexp(logits_NV.masked_fill(masked_NV, LOG_ZERO), 1, keepdim=True)
    return torch.cat([support_NK, rest_N1], 1)


def sparse_divergence(
    name: str, logits_NV: Tensor, targets: SparseTargets, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """D_N [N], float32 nats per token, of the K+1 outcomes; differentiable once in the student's logits.

    Forward KL is sum_K t log(t/p) + T log(T/S) with tails T and S. distill_loss computes the same without keeping
    logits. Raises ConfigError as dense_divergence does.
    """
    check_settings(name, beta, temperature)
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    y_NK1 = outcome_logits(logits_NV.to(dtype), targets)
    return dense_divergence(name, y_NK1, teacher_logits(targets, dtype), beta=beta, temperature=temperature)
