"""One call of the loss, checked and settled: what fused.py hands to the chunks.

Shape legend: N tokens, G teacher hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distill.losses.buckets import BucketedTargets
from distill.losses.reduce import IGNORE_INDEX
from distill.losses.sparse import SparseTargets


@dataclass(frozen=True)
class DenseTeacher:
    """An online teacher over the student's vocabulary: its hidden states [N, G] and head [V, G]; it gets no
    gradient."""

    hidden_NG: Tensor
    head_VG: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Job:
    """Everything of one call besides the three tensors that may need a gradient."""

    labels_N: Tensor
    targets: SparseTargets | BucketedTargets | DenseTeacher | None
    scale_N: Tensor
    alpha_N: Tensor
    divergence: str
    beta: float
    temperature: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    vocab_size: int
    block_tokens: int  # whose dL/dlogits exist at a time
    chunk_tokens: int  # whose logits exist at a time
    dtype: torch.dtype  # of logits and per-token losses
    operand_dtype: torch.dtype  # of what enters a matrix product
    kernels: bool  # Triton reads the logits and writes their gradient to a stash
    accumulate: torch.dtype  # in which the head's gradient adds up over chunks
    unit: float  # a power of two by which loss and gradients are too large until they are handed out
    needs_grad: tuple[bool, bool, bool] = field(default=(False, False, False))  # hidden, head, bias
    set_N: Tensor | None = None  # which entry of set_losses_S each token's share of the loss is added to
    set_losses_S: Tensor | None = None
    add_up_chunks: Callable[[Tensor, Tensor], Tensor] | None = None  # over the ranks that hold a chunk's tokens
    slope_N: Tensor | None = None  # with offset_N: the chunks' loss as its tangent (chunks.py), weighted as D is
    offset_N: Tensor | None = None

    def valid(self) -> tuple["Job", Tensor | None]:
        """This job over its valid tokens alone, and their positions; itself and None where all are valid."""
        rows = (self.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        if len(rows) == len(self.labels_N):
            return self, None
        targets = self.targets
        if isinstance(targets, SparseTargets | BucketedTargets):
            targets = targets.rows(rows)
        elif targets is not None:
            targets = replace(targets, hidden_NG=targets.hidden_NG[rows])
        names = ("labels_N", "scale_N", "alpha_N", *(("set_N",) if self.set_N is not None else ()))
        columns = {name: getattr(self, name)[rows] for name in names}
        return replace(self, targets=targets, **columns), rows

    def mix(self, value_C: Tensor, ce_C: Tensor, lse_C: Tensor, part: slice) -> Tensor:
        """The loss of a chunk: its tokens' divergence, cross-entropy and z-loss, weighted and summed."""
        scale_C, alpha_C = self.scale_N[part], self.alpha_N[part]
        if self.slope_N is not None:
            value_C = value_C + self.slope_N[part] * ce_C + self.offset_N[part]
        loss_C = alpha_C * value_C + (1 - alpha_C) * ce_C
        if self.z_loss:
            loss_C = loss_C + self.z_loss * lse_C.square()
        return self.total(scale_C * loss_C, part)

    def total(self, loss_C: Tensor, part: slice) -> Tensor:
        """The sum over a chunk of what each token adds to the loss; also taken apart by set where the call asks."""
        if self.set_N is not None:
            self.set_losses_S.index_add_(0, self.set_N[part], loss_C.double() / self.unit)
        return loss_C.sum()

    def coefficients(self, lse_C: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the gradient to the logits takes times dD/dz, times p, and off at the label: each [C, 1]."""
        scale_C, alpha_C = self.scale_N[part], self.alpha_N[part]
        ce_scale_C = scale_C * (1 - alpha_C)
        if self.slope_N is not None:
            ce_scale_C = ce_scale_C + scale_C * alpha_C * self.slope_N[part]
        p_scale_C = ce_scale_C + 2 * self.z_loss * lse_C * scale_C
        return tuple(x_C.unsqueeze(1) for x_C in (scale_C * alpha_C, p_scale_C, ce_scale_C))
