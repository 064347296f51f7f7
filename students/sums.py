"""Adding a gradient in bfloat16 to its float32 sum in one pass over memory, with wide reads and writes, which torch's
own addition of two dtypes on a GPU does without.

With TRITON_INTERPRET=1 the same kernel runs on CPU tensors.
"""

import torch
import triton
import triton.language as tl

SIZE, WARPS = 4096, 8  # elements and warps of a program


@triton.jit
def _add(total, part, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    wide = tl.load(total + at, mask=inside) + tl.load(part + at, mask=inside).to(tl.float32)
    tl.store(total + at, wide, mask=inside)


def add(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part, bit for bit. total: float32, contiguous; part: any dtype, as many elements in the same order."""
    count = total.numel()
    _add[(triton.cdiv(count, SIZE),)](total, part.contiguous(), count, SIZE=SIZE, num_warps=WARPS)
