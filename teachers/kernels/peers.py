"""The exchange of a decode step between GPUs of one host: kernels that write into each other's memory.

For the few rows of a step NCCL's messages cost more than their bytes: 41 microseconds a layer on two H100. Here one
kernel pushes the tokens to every share, and the sums over this rank's experts go straight to the share that asked;
after each comes a barrier over NVLink. A share then holds a part from everyone, and the next norm adds them up in fp32.

Two buffers are enough. Tokens of the next layer are pushed after the barrier of this layer's answers, which every rank
reaches when it has read its tokens; answers of the next layer after the barrier of its tokens, which every rank reaches
when it has added up this layer's.

Shape legend: T rows of a share, S shares, G = S T, E hidden size, K experts a token.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _push(x, peers, T, E, SHARE, BLOCK: tl.constexpr):
    row, peer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = tl.load(peers + peer).to(tl.pointer_type(x.dtype.element_ty)) + (SHARE * T + row) * E
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        tl.store(to + e, tl.load(x + row * E + e, mask=e < E), mask=e < E)


@triton.jit
def _answer(parts, chosen, peers, X, T, E, SHARE, S, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        size = tl.where(tl.load(chosen + row * K + k) < X, E, 0)
        total += tl.load(parts + (row * K + k) * E + e, mask=e < size, other=0.0).to(tl.float32)
    to = tl.load(peers + row // T).to(tl.pointer_type(parts.dtype.element_ty)) + ((row % T) * S + SHARE) * E
    tl.store(to + e, total.to(parts.dtype.element_ty), mask=e < E)


def push(x_TE: Tensor, buffers_S: Tensor, share: int) -> None:
    """Writes the rows of this share to their place among those [G, E] of all shares, in the buffer of each."""
    rows, size = x_TE.shape
    _push[(rows, len(buffers_S))](x_TE, buffers_S, rows, size, share, BLOCK=BLOCK, num_warps=4)


def answer(out_GKE: Tensor, chosen_GK: Tensor, experts: int, buffers_S: Tensor, share: int) -> None:
    """Writes teachers.plain.combine of each share's rows to part `share` of [T, S, E] in that share's buffer."""
    (tokens, top_k, size), shares = out_GKE.shape, len(buffers_S)
    _answer[(tokens, triton.cdiv(size, BLOCK))](
        out_GKE, chosen_GK, buffers_S, experts, tokens // shares, size, share, shares, K=top_k, BLOCK=BLOCK, num_warps=4
    )


class Peers:
    """Buffers for `rows` rows of `size` numbers a share; made by all ranks of the group at the same time."""

    def __init__(self, group: dist.ProcessGroup, rows: int, size: int, dtype: torch.dtype, device: torch.device):
        self.share, self.shares = group.rank(), group.size()
        self.tokens, self.answers = (
            symmetric.empty(self.shares * rows * size, dtype=dtype, device=device) for _ in range(2)
        )
        self.tokens_S, self.answers_S = (self._addresses(buffer, group) for buffer in (self.tokens, self.answers))

    def _addresses(self, buffer: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Where each share's buffer lies, as this rank sees it: int64 [S]."""
        self.handle = symmetric.rendezvous(buffer.zero_(), group)
        places = [self.handle.get_buffer(s, buffer.shape, buffer.dtype).data_ptr() for s in range(self.shares)]
        if places[self.share] != buffer.data_ptr():
            raise RuntimeError("symmetric memory does not begin where its buffer does")
        return torch.tensor(places, dtype=torch.int64, device=buffer.device)

    def gather(self, x_TE: Tensor) -> Tensor:
        """The rows [G, E] of all shares."""
        push(x_TE, self.tokens_S, self.share)
        self.handle.barrier(channel=0)
        return self.tokens[: self.shares * x_TE.numel()].view(-1, x_TE.shape[1])

    def scatter(self, out_GKE: Tensor, chosen_GK: Tensor, experts: int) -> Tensor:
        """Parts [T, S, E], one from every share, of the sum over the experts of this share's rows."""
        answer(out_GKE, chosen_GK, experts, self.answers_S, self.share)
        self.handle.barrier(channel=0)
        tokens, _, size = out_GKE.shape
        return self.answers[: tokens * size].view(-1, self.shares, size)
