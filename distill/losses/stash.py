"""dL/dlogits of a block of tokens, kept until the two products that consume it, and the head's gradient made from it
in the very same memory.

Summed over chunks in bfloat16, a head's gradient is rounded once a chunk; summed in float32 it takes twice its size.
Kept whole, dL/dlogits needs one product and one rounding. It lies in vertical slices, one behind the other: once slice
s has become rows of the head's gradient, its memory and that of the slices before are free, and since a gradient row
(H numbers) is no longer than a column of the stash (N numbers), the gradient grows from the front without ever
reaching a slice that is still needed. The room that the first slice's rows need in front holds a chunk's logits before.

Shape legend: N tokens of the block, W columns of a slice, H hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLICES = 4
BLOCK = 8192  # a slice is a whole number of so many columns; kernels look at a power of two up to it at a time


@dataclass(frozen=True)
class GradStash:
    """Room for [rows, vocab] gradients in slices of `width` columns, every slice row-major, behind `front` numbers of
    the same memory that are free until the gradients are consumed."""

    room: Tensor
    front: int
    rows: int
    vocab: int
    width: int

    @classmethod
    def empty(
        cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, logits_bytes: int, hidden: int
    ) -> "GradStash":
        """front holds a chunk's logits, and the head's gradient (rows of `hidden`) of the first slice."""
        block = stash_block(vocab)
        width = -(-vocab // (SLICES * block)) * block
        front = max(-(-logits_bytes // dtype.itemsize), min(width, vocab) * hidden if hidden <= rows else 0)
        front = -(-front // 64) * 64
        room = torch.empty(front + rows * _aligned(vocab), dtype=dtype, device=device)
        return cls(room, front, rows, vocab, width)

    @property
    def grads(self) -> Tensor:
        return self.room[self.front :]

    @property
    def block(self) -> int:
        return stash_block(self.vocab)

    @property
    def padded(self) -> int:
        """The vocabulary with the last slice's rows aligned to 16 bytes, as matrix products want them."""
        return _aligned(self.vocab)

    def logits_room(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] at the front."""
        numbers = rows * width * dtype.itemsize // self.room.element_size()
        return self.room[:numbers].view(dtype).view(rows, width)

    def slices(self, rows: int) -> list[tuple[int, Tensor]]:
        """(first column, [rows, W]) of every slice."""
        return [(first, self._slice(first)[:rows]) for first in range(0, self.vocab, self.width)]

    def _slice(self, first: int) -> Tensor:
        width = min(self.width, self.padded - first)
        flat = self.grads[first * self.rows : (first + width) * self.rows]
        return flat.view(self.rows, width)[:, : min(self.width, self.vocab - first)]

    def holds_head_gradient(self, head_VH: Tensor) -> bool:
        """Whether become_head_gradient may be called."""
        hidden = head_VH.shape[1]
        fits = hidden <= self.rows and min(self.width, self.vocab) * hidden <= self.front
        return fits and head_VH.numel() <= self.room.numel() and head_VH.dtype == self.room.dtype

    def become_head_gradient(self, hidden_NH: Tensor, head_rows: int) -> Tensor:
        """[head_rows, H]: stash.T @ hidden, rows past the vocabulary zero; the stash is used up, the memory shared."""
        hidden = hidden_NH.shape[1]
        for first, grad_NW in self.slices(len(hidden_NH)):
            last = first + grad_NW.shape[1]  # last * hidden <= front + first * rows: it ends before its own operand
            torch.mm(grad_NW.T, hidden_NH, out=self.room[first * hidden : last * hidden].view(-1, hidden))
        whole = self.room[: head_rows * hidden].view(head_rows, hidden)
        whole[self.vocab :].zero_()
        return whole


def stash_block(vocab: int) -> int:
    """Columns of which a slice is a whole number: a power of two."""
    return min(BLOCK, 1 << (vocab - 1).bit_length())


def _aligned(vocab: int) -> int:
    return -(-vocab // 8) * 8
