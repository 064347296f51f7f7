"""Teacher targets whose outcomes are sets of student tokens: what a teacher with another tokenizer can say.

A teacher token that the student spells otherwise says which BUCKET of student tokens comes next, not which member. With
outcomes instead of tokens the divergence is that of sparse.py, and a second term says which member of its bucket (or of
the rest) the sampled token s was:

    loss = D(Q, P(buckets, rest)) - log P(s | its bucket)

For forward KL this is the cross-entropy of the text with its first part averaged over what the teacher might have said.
Buckets of one member, with s among them, make the second term 0 and the first the loss of sparse.py. A row without
outcomes (tail 1) is plain cross-entropy.

The second term is right on average over tokens that the teacher drew. Text that it only read (a human's, the student's
own) is no sample of it: there the first term stands without it, beside how likely whole chunks are (chunks.py).

In logits: the outcome of bucket B is y_B = logsumexp of its members, so a gradient g to y_B is g times the softmax
within B to each member.

Shape legend: N tokens, K members (padded), G outcomes (padded).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.losses.divergence import LOG_ZERO


@dataclass(frozen=True)
class BucketedTargets:
    """Teacher distributions over disjoint sets of student tokens, at temperature 1.

    ids_NK: int64 student ids, distinct within a row. group_NK: int64, the outcome 0 .. G-1 that each belongs to, -1
    where padded. logprobs_NG: log-probability of each outcome, -inf where padded. tail_N: mass of every other token.
    drawn_N: bool, whether the teacher drew the token, so that the second term stands; None where it drew all.
    chunk_N: int64, equal for the tokens of one chunk, -1 outside of any, and chunk_logprobs_N: the teacher's
    log-probability of that chunk; None without chunks.
    """

    ids_NK: Tensor
    group_NK: Tensor
    logprobs_NG: Tensor
    tail_N: Tensor
    drawn_N: Tensor | None = None
    chunk_N: Tensor | None = None
    chunk_logprobs_N: Tensor | None = None

    @property
    def padded_NK(self) -> Tensor:
        return self.group_NK < 0

    @property
    def logprobs_NK(self) -> Tensor:
        """What the K+1 divergences compare the outcomes with: [N, G]."""
        return self.logprobs_NG

    def rows(self, index: Tensor | slice) -> "BucketedTargets":
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> "BucketedTargets":
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "BucketedTargets":
        return BucketedTargets(*(None if x is None else change(x) for x in vars(self).values()))

    def check(self, vocab_size: int, *, distinct: bool = True) -> None:
        """Raise DataError, naming the row, for ids outside the vocabulary or twice, or masses that do not sum to 1."""
        from distill.losses.sparse import SparseTargets

        members = torch.zeros_like(self.ids_NK, dtype=self.logprobs_NG.dtype).masked_fill(self.padded_NK, -torch.inf)
        shares = members.exp() / members.exp().sum(1, keepdim=True).clamp(min=1)
        uniform = SparseTargets(self.ids_NK, shares.log(), (1 - shares.sum(1)).clamp(min=0))
        uniform.check(vocab_size, distinct=distinct)
        outcome_ids = torch.arange(self.logprobs_NG.shape[1], device=self.ids_NK.device).expand_as(self.logprobs_NG)
        SparseTargets(outcome_ids, self.logprobs_NG, self.tail_N).check(max(outcome_ids.shape[1], 1), distinct=False)

    def outcomes(self, members_NK: Tensor) -> Tensor:
        """[N, G]: logsumexp of each bucket's member logits; LOG_ZERO where there is none."""
        slot_NK = self.group_NK.masked_fill(self.padded_NK, self.logprobs_NG.shape[1])
        shape = (len(members_NK), self.logprobs_NG.shape[1] + 1)
        high = members_NK.new_full(shape, LOG_ZERO).scatter_reduce_(1, slot_NK, members_NK, "amax")
        total = torch.zeros_like(high).scatter_add_(1, slot_NK, (members_NK - high.gather(1, slot_NK)).exp())
        found = torch.where(total > 0, high + total.clamp(min=torch.finfo(total.dtype).tiny).log(), LOG_ZERO)
        return found[:, :-1].clamp(min=LOG_ZERO)

    def shares(self, members_NK: Tensor, outcomes_NG: Tensor) -> Tensor:
        """[N, K]: the softmax of each member within its bucket, 0 where padded."""
        if not outcomes_NG.shape[1]:
            return torch.zeros_like(members_NK)
        inside = self.spread(outcomes_NG)
        return (members_NK - inside).exp().masked_fill(self.padded_NK, 0)

    def spread(self, values_NG: Tensor) -> Tensor:
        """[N, K]: each member's outcome's value; any finite one where padded."""
        return values_NG.gather(1, self.group_NK.clamp(min=0))
