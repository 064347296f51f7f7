"""What a loss call measures beside the loss: detached sums that add up over chunks, micro-batches and ranks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossMetrics:
    """Sums over the valid tokens of one call, unweighted, float64 scalars on the loss's device, nats where not counts.

    Over all valid tokens: their number, cross-entropy, student entropy, and how often the student's most likely token
    is the label. Over those with a teacher distribution: their number, the divergence as trained (T^2 included), the
    forward KL at temperature 1, how often the most likely tokens of both agree, the student's mass on and off the
    teacher's support, and the teacher's off it.
    """

    tokens: Tensor
    ce: Tensor
    entropy: Tensor
    label_top1: Tensor
    teacher_tokens: Tensor
    divergence: Tensor
    kl: Tensor
    top1: Tensor
    support_mass: Tensor
    student_tail: Tensor
    teacher_tail: Tensor

    @classmethod
    def sums(cls, **per_token_C: Tensor) -> Tensor:
        """[M] float64: each field's per-token values [C] (or [C, 1]) summed, in field order."""
        dtype = per_token_C["ce"].dtype
        return torch.stack([per_token_C[f.name].flatten().to(dtype) for f in fields(cls)]).sum(1, dtype=torch.float64)

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "LossMetrics":
        return cls.from_tensor(torch.zeros(len(fields(cls)), dtype=torch.float64, device=device))

    @classmethod
    def from_tensor(cls, sums_M: Tensor) -> "LossMetrics":
        return cls(*sums_M.unbind())

    def as_tensor(self) -> Tensor:
        """[M] float64, to be summed over ranks in one all-reduce and read back by from_tensor."""
        return torch.stack([getattr(self, f.name) for f in fields(self)])

    def __add__(self, other: "LossMetrics") -> "LossMetrics":
        return self.from_tensor(self.as_tensor() + other.as_tensor())

    def means(self) -> dict[str, float]:
        """Each sum divided by the number of tokens it runs over; the two counts as they are; 0 where there were
        none."""
        values = dict(zip((f.name for f in fields(self)), self.as_tensor().tolist()))
        over_all = ("ce", "entropy", "label_top1")
        for name in values.keys() - {"tokens", "teacher_tokens"}:
            count = values["tokens" if name in over_all else "teacher_tokens"]
            values[name] = values[name] / count if count else 0.0
        return values
