"""The LM head as it enters the loss: logits of one chunk, and where the gradients of hidden states and head add up.

Shape legend: N tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.job import Job
from distill.losses.stash import GradStash

ROUND_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: softcap(logit_scale * (hidden @ weight.T + bias)) with softcap(x) = c tanh(x / c)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def product(self, hidden_CH: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T in float32: what the kernels read, who do the rest of `logits` in registers."""
        return matmul(hidden_CH, self.weight_VH.T, out)

    def logits(self, hidden_CH: Tensor, out: Tensor | None = None) -> Tensor:
        """[C, V] in float32 (float64 for float64 operands), written to `out` where given."""
        logits_CV = self.product(hidden_CH, out)
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if self.logit_scale != 1.0:
            logits_CV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV


class HeadGradients:
    """Gradients of hidden states, head and bias, added up block by block of tokens.

    Every sum over tokens or vocabulary is float32 (float64) and rounded once: a single block's product is rounded to
    the head's dtype, several are added in `job.accumulate` first.
    """

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor | None], rows: Tensor | None, job: Job):
        """rows: positions of the tokens that the job is over, None for all of them in order."""
        self.inputs, self.rows, self.job, self.head_VH = inputs, rows, job, None
        bias = inputs[2]
        self.hidden_NH = None
        self.bias_V = torch.zeros_like(bias, dtype=job.dtype) if job.needs_grad[2] else None

    def add(self, slices: list[tuple[int, Tensor]], hidden_CH: Tensor, part: slice, weight_VH: Tensor) -> None:
        """Adds tokens whose dL/d(hidden @ head.T) comes in slices (first column, [C, W]) of the operands' dtype."""
        self._add_hidden_and_bias(slices, part, weight_VH)
        if self.job.needs_grad[1]:
            for first, grad_CW in slices:
                self._add_head(first, grad_CW.T, hidden_CH)

    def take(self, stash: GradStash, hidden_CH: Tensor, part: slice, weight_VH: Tensor, only: bool) -> None:
        """`add` of a stash; the `only` block of a call turns it into the head's gradient where it can."""
        slices, head = stash.slices(len(hidden_CH)), self.inputs[1]
        if not (only and self.job.needs_grad[1] and stash.holds_head_gradient(head)):
            return self.add(slices, hidden_CH, part, weight_VH)
        self._add_hidden_and_bias(slices, part, weight_VH)
        self.head_VH = stash.become_head_gradient(hidden_CH, len(head))

    def _add_hidden_and_bias(self, slices: list[tuple[int, Tensor]], part: slice, weight_VH: Tensor) -> None:
        if self.job.needs_grad[0]:
            self._place_hidden(self._hidden(slices, weight_VH), part)
        if self.bias_V is not None:
            for first, grad_CW in slices:
                self.bias_V[first : first + grad_CW.shape[1]] += grad_CW.sum(0, dtype=self.job.dtype)

    def _place_hidden(self, grad_CH: Tensor, part: slice) -> None:
        hidden = self.inputs[0]
        if self.rows is None and len(grad_CH) == len(hidden):
            self.hidden_NH = grad_CH  # rounded in place at the end
            return
        if self.hidden_NH is None:
            self.hidden_NH = torch.zeros_like(hidden, dtype=hidden.dtype if self.job.kernels else self.job.dtype)
        where = part if self.rows is None else self.rows[part]
        self.hidden_NH[where] = grad_CH.to(self.hidden_NH.dtype)

    def _hidden(self, slices: list[tuple[int, Tensor]], weight_VH: Tensor) -> Tensor:
        total_CH = None
        for first, grad_CW in slices:
            weight_WH = weight_VH[first : first + grad_CW.shape[1]]
            total_CH = matmul(grad_CW, weight_WH) if total_CH is None else add_matmul_(total_CH, grad_CW, weight_WH)
        return total_CH

    def _add_head(self, first: int, grad_WC: Tensor, hidden_CH: Tensor) -> None:
        if self.head_VH is None:
            self.head_VH = torch.zeros_like(self.inputs[1], dtype=self.job.accumulate)
        rows_WH = self.head_VH[first : first + len(grad_WC)]
        if rows_WH.dtype == grad_WC.dtype:
            rows_WH.addmm_(grad_WC, hidden_CH)
        else:
            add_matmul_(rows_WH, grad_WC, hidden_CH)

    def finished(self) -> list[Tensor | None]:
        """The gradients in the dtypes of their inputs."""
        if self.job.needs_grad[0] and self.hidden_NH is None:
            self.hidden_NH = torch.zeros_like(self.inputs[0])
        if self.job.needs_grad[1] and self.head_VH is None:
            self.head_VH = torch.zeros_like(self.inputs[1])
        sums = (self.hidden_NH, self.head_VH, self.bias_V)
        return [total if total is None else round_in_place(total, x.dtype) for total, x in zip(sums, self.inputs)]


def round_in_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values.to(dtype); a narrower dtype takes the front half of the same memory, so that nothing exists twice."""
    if dtype.itemsize >= values.dtype.itemsize or values.numel() < ROUND_NUMBERS:
        return values.to(dtype)
    flat, narrow = values.view(-1), values.view(-1).view(dtype)
    for start in range(0, len(flat), ROUND_NUMBERS):
        part = flat[start : start + ROUND_NUMBERS].to(dtype)
        narrow[start : start + len(part)] = part  # the numbers that lay there were read before, or just now
    return narrow[: len(flat)].view(values.shape)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b accumulated and returned in float32 (float64 for float64), also for half-precision operands on a GPU."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, **({} if out is None else {"out": out}))


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b with one float32 (float64) sum."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def operand_dtype(hidden_NH: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Half precision enters matrix products only on a GPU, which accumulates them in float32."""
    device = hidden_NH.device.type
    if device == "cpu":
        return dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_NH.dtype if hidden_NH.dtype in (torch.bfloat16, torch.float16) else dtype
