"""What the ranks that hold one copy of a model tell each other while they run it over pages.

    tensor group   neighbours: the same rows, each with its part of the heads, the dense layers and the vocabulary.
                   Partial sums are added up over them, parts of the logits are put side by side.
    share group    the ranks with one place in their tensor groups: different rows. Before the routed experts they show
                   each other their tokens; each answers all of them with the experts it holds; the answers are added
                   up where the tokens came from. With the sum over the tensor group every expert is heard once.

So a forward pass of shares is an exchange: before each, `meet` finds out what they want. If one has a prompt, all make
a prefill, those without with no token of their own; else they step together, on as many rows as the share with most.
What runs is decided by the same numbers on every rank, and so are the sizes of all messages and of recorded steps.

Shape legend: T tokens of this rank, G of all shares, S shares, E hidden size, N rows, W vocabulary of a rank.
"""

import socket
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.split import Split
from teachers.transfer import to_device

# torch 2.13 renames them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

GATHERED_TOKENS = 16384  # of all shares together, that the experts answer at once


@dataclass(frozen=True)
class Pass:
    """What the shares run next: at most `most` tokens or rows each; of a step, the most that one asks of its draws."""

    is_prefill: bool
    most: int
    draws: tuple[int, int, int]


@dataclass(frozen=True)
class Stretch:
    """Tokens start..start+rows-1 of every share, of which share s has the first counts_S[s]."""

    start: int
    rows: int
    counts_S: Tensor


class Mesh:
    """This rank's place in its copy and the groups it talks over; made by all ranks of the run at the same time."""

    def __init__(self, split: Split, device: torch.device):
        self.device, self.split = device, split
        self.tensor, self.place = split.tensor_parallel, split.tensor_rank
        self.shares = split.size // split.tensor_parallel
        self.groups: list[dist.ProcessGroup] = []
        firsts = range(0, split.world, self.tensor)
        self._tensor = self._mine(range(first, first + self.tensor) for first in firsts)
        self._share = self._mine(block[i :: self.tensor] for block in split.blocks for i in range(self.tensor))
        self._host = self._mine(split.blocks, backend="gloo")
        self._wanted_5 = torch.zeros(5, dtype=torch.int64)
        self._wanted_R5 = torch.zeros(split.size, 5, dtype=torch.int64)
        # A recorded step reads its counts from here.
        self.step_counts_S = torch.zeros(self.shares, dtype=torch.int32, device=device)
        self.stretches: list[Stretch] = []  # of the pass that is under way
        self.peers = None  # of a step, where GPUs write into each other's memory: teachers.kernels.peers

    def _mine(self, ranks_of: Iterable[range], **how) -> dist.ProcessGroup | None:
        """The group that this rank is in; None for groups of one."""
        mine = None
        for ranks in ranks_of:
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), **how)
                if self.split.rank in ranks:
                    mine = group
                    self.groups.append(group)
        return mine

    # ---- agreement -------------------------------------------------------------------------------------------------

    def meet(self, *, prefill: int = 0, rows: int = 0, draws: tuple[int, int, int] = (0, 0, 0)) -> Pass | None:
        """What the shares run now, None when none of them wants anything; called by all ranks of the copy.

        prefill: tokens of a prompt that this rank wants to run; else rows that it wants to step, and how they draw.
        """
        self._wanted_5[:] = torch.tensor((prefill, rows, *draws))
        _all_gather(self._wanted_R5.view(-1), self._wanted_5, group=self._host)
        wanted_S5 = self._wanted_R5.numpy()[self.place :: self.tensor]
        prefill, rows, *draws = wanted_S5.max(0).tolist()
        if not prefill and not rows:
            return None
        now = Pass(bool(prefill), prefill or rows, tuple(draws))
        counts_S = wanted_S5[:, 0 if prefill else 1]
        if now.is_prefill:
            self.stretches = self._stretches(counts_S, now.most)
        else:
            self.step_counts_S.copy_(self._counts(counts_S), non_blocking=True)
            self.step_over(now.most)
        return now

    def prepare_steps(self, rows: int, size: int, dtype: torch.dtype) -> None:
        """Room for steps of up to so many rows of `size` numbers on every share; called by all ranks of the copy."""
        if self.shares > 1 and self.device.type == "cuda" and self._are_peers():
            from teachers.kernels.peers import Peers

            self.peers = Peers(self._share, rows, size, dtype, self.device)

    def _are_peers(self) -> bool:
        """Whether all GPUs of the copy are in one host and reach each other's memory."""
        mine = (socket.gethostname(), self.device.index)
        all_of: list[tuple[str, int]] = [mine] * self.split.size
        dist.all_gather_object(all_of, mine, group=self._host)
        here = [index for host, index in all_of if host == mine[0]]
        reach = (torch.cuda.can_device_access_peer(self.device, index) for index in here if index != self.device.index)
        return bool(self.least(int(len(here) == self.split.size and all(reach))))

    def step_over(self, rows: int) -> None:
        """The next step has so many rows on every share, of which step_counts_S count."""
        self.stretches = [Stretch(0, rows, self.step_counts_S)]

    def _stretches(self, counts_S: np.ndarray, most: int) -> list[Stretch]:
        rows = max(1, min(most, GATHERED_TOKENS // self.shares))
        starts = range(0, most, rows)
        return [Stretch(at, min(rows, most - at), self._counts((counts_S - at).clip(0, rows))) for at in starts]

    def _counts(self, counts_S: np.ndarray) -> Tensor:
        return to_device(counts_S.astype(np.int32), self.device)

    def least(self, number: int) -> int:
        """The smallest of the copy's numbers."""
        least_1 = torch.tensor([number])
        dist.all_reduce(least_1, dist.ReduceOp.MIN, group=self._host)
        return int(least_1)

    # ---- over the shares -------------------------------------------------------------------------------------------

    def gather(self, x_TE: Tensor, stretch: Stretch) -> Tensor:
        """The stretch's tokens of all shares [G, E], share after share; what a share has less of is zero."""
        part_TE = x_TE[stretch.start : stretch.start + stretch.rows]
        if len(part_TE) < stretch.rows:
            padded_TE = x_TE.new_zeros(stretch.rows, x_TE.shape[1])
            padded_TE[: len(part_TE)] = part_TE
            part_TE = padded_TE
        x_GE = x_TE.new_empty(self.shares * stretch.rows, x_TE.shape[1])
        _all_gather(x_GE, part_TE.contiguous(), group=self._share)
        return x_GE

    def scatter(self, answers_GE: Tensor) -> Tensor:
        """The sum [T, E] of all shares' answers to this rank's tokens of the stretch."""
        sum_TE = answers_GE.new_empty(len(answers_GE) // self.shares, answers_GE.shape[1])
        _reduce_scatter(sum_TE, answers_GE, group=self._share)
        return sum_TE

    # ---- over the tensor group -------------------------------------------------------------------------------------

    def summed(self, part: Tensor) -> Tensor:
        """The sum of the group's parts, in the memory of this one."""
        if self.tensor > 1:
            dist.all_reduce(part, group=self._tensor)
        return part

    def side_by_side(self, logits_NW: Tensor) -> Tensor:
        """Logits [N, ways * W] of the group's parts of the vocabulary, the same on each."""
        all_PW = logits_NW.new_empty(self.tensor * len(logits_NW), logits_NW.shape[1])  # part after part
        _all_gather(all_PW, logits_NW.contiguous(), group=self._tensor)
        return all_PW.unflatten(0, (self.tensor, -1)).transpose(0, 1).flatten(1)

    def same(self, drawn: Tensor) -> Tensor:
        """What the first of the group has drawn, in the memory of this one: ranks that draw alike stay alike."""
        if self.tensor > 1:
            dist.broadcast(drawn, self.split.rank - self.place, group=self._tensor)
        return drawn
