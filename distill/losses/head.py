"""The LM head as it enters the loss: logits of one chunk, and matrix products that accumulate in float32.

Shape legend: C tokens of a chunk, H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: softcap(logit_scale * (hidden @ weight.T + bias)) with softcap(x) = c tanh(x / c)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CH: Tensor, out: Tensor | None = None) -> Tensor:
        """[C, V] in float32 (float64 for float64 operands), written to `out` where given."""
        logits_CV = matmul(hidden_CH, self.weight_VH.T, out)
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if self.logit_scale != 1.0:
            logits_CV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b accumulated and returned in float32 (float64 for float64), also for half-precision operands on a GPU."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    product = torch.mm(a, b, out_dtype=torch.float32)
    return product if out is None else out.copy_(product)


def operand_dtype(hidden_NH: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Half precision enters matrix products only on a GPU, which accumulates them in float32."""
    device = hidden_NH.device.type
    if device == "cpu":
        return dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype if hidden_NH.dtype in (torch.bfloat16, torch.float16) else dtype
