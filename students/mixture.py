"""Several sets of examples trained on together: the run's own traces, those of other runs, texts, general data.

A set has a weight, the passes over it in an epoch, an alpha, the weight of the divergence in its tokens' loss, and a
weight of that loss.
Tokens of all sets may share a row; each token knows its set, so that the loss can be told by set.

Shape legend: M trained positions of a micro-batch, K support, G outcomes.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from distill.errors import DataError
from distill.losses.buckets import BucketedTargets
from distill.losses.sparse import SparseTargets
from students.data import Batch, Example, TraceData, assemble


@dataclass(frozen=True)
class Part:
    """One set of a mixture. weight: passes over it in an epoch. alpha: 0 trains its tokens on the text alone.
    loss_weight: what each of its tokens counts for in the loss."""

    name: str
    data: TraceData
    weight: float = 1.0
    alpha: float = 0.0
    loss_weight: float = 1.0


class Mixture:
    """The examples of all parts, one part after the other; a mixture of one part gives that part's own batches."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.examples = [example for part in self.parts for example in part.data.examples]
        self.set_of = [index for index, part in enumerate(self.parts) for _ in part.data.examples]
        self.counts = {name: n for i, part in enumerate(self.parts) for name, n in _counts(part, i).items()}

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def keys(self) -> list[str]:
        """A name of each example that no other has; those of the first part are their traces' own."""
        first, *others = self.parts
        return first.data.keys + [f"{part.name}:{key}" for part in others for key in part.data.keys]

    @property
    def lengths(self) -> list[int]:
        return [length for part in self.parts for length in part.data.lengths]

    @property
    def trained(self) -> list[int]:
        return [tokens for part in self.parts for tokens in part.data.trained]

    @property
    def has_teacher(self) -> bool:
        """Whether any token has a distribution to learn from."""
        return any(part.data.caches is not None for part in self.parts)

    def collate(self, rows: list[list[int]], vocab_rows: int) -> Batch:
        """The micro-batch of these rows of indices; see TraceData.collate."""
        if len(self.parts) == 1:
            return self.parts[0].data.collate(rows, vocab_rows)
        members = [i for row in rows for i in row]
        if not members:
            empty = self.parts[0].data.collate([], vocab_rows)
            zero = torch.zeros(1, dtype=torch.int64)
            return replace(empty, set_M=zero, alpha_M=torch.zeros(1), weight_M=torch.ones(1))
        examples = [self.examples[i] for i in members]
        tokens = torch.tensor([len(example.trained) for example in examples])
        set_M = torch.tensor([self.set_of[i] for i in members]).repeat_interleave(tokens)
        alpha_M = torch.tensor([part.alpha for part in self.parts])[set_M]
        weight_M = torch.tensor([part.loss_weight for part in self.parts])[set_M]
        batch = assemble(examples, self._targets(members, examples, set_M, vocab_rows))
        return replace(batch, set_M=set_M, alpha_M=alpha_M, weight_M=weight_M)

    def _targets(
        self, members: list[int], examples: list[Example], set_M: torch.Tensor, vocab_rows: int
    ) -> SparseTargets | BucketedTargets | None:
        found = []
        for index, part in enumerate(self.parts):
            mine = [example for i, example in zip(members, examples) if self.set_of[i] == index]
            targets = part.data.targets(mine, vocab_rows) if mine else None
            if targets is not None:
                found.append(((set_M == index).nonzero().squeeze(1), targets))
        if not self.has_teacher:
            return None
        targets = merge(len(set_M), found)
        drawn_S = torch.tensor([part.data.drawn for part in self.parts])
        if isinstance(targets, SparseTargets) or drawn_S.all():
            return targets
        return replace(targets, drawn_N=drawn_S[set_M])


def _counts(part: Part, index: int) -> dict[str, int]:
    """The first part's counts under their own names, the others' with the part's."""
    return dict(part.data.counts) if index == 0 else {f"{part.name}_{k}": v for k, v in part.data.counts.items()}


def merge(
    tokens: int, parts: Sequence[tuple[torch.Tensor, SparseTargets | BucketedTargets]]
) -> SparseTargets | BucketedTargets:
    """Targets of `tokens` tokens from (positions, targets) pairs; a token in none of them has no distribution.

    With buckets in one of them all are buckets: of a single token each where the distribution is over tokens.
    """
    kinds = [targets for _, targets in parts]
    width = max((targets.ids_NK.shape[1] for targets in kinds), default=1)
    ids_MK, tail_M = torch.zeros(tokens, width, dtype=torch.int64), torch.ones(tokens)
    for where, targets in parts:
        ids_MK[where, : targets.ids_NK.shape[1]] = targets.ids_NK
        tail_M[where] = targets.tail_N
    outcomes = max((targets.logprobs_NK.shape[1] for targets in kinds), default=1)
    logprobs_MG = torch.full((tokens, outcomes), -torch.inf)
    for where, targets in parts:
        logprobs_MG[where, : targets.logprobs_NK.shape[1]] = targets.logprobs_NK
    if not any(isinstance(targets, BucketedTargets) for targets in kinds):
        return SparseTargets(ids_MK, logprobs_MG, tail_M)
    group_MK = torch.full((tokens, width), -1)
    for where, targets in parts:
        group_MK[where, : targets.ids_NK.shape[1]] = _groups(targets)
    return BucketedTargets(ids_MK, group_MK, logprobs_MG, tail_M, **_merged_chunks(tokens, parts))


def _merged_chunks(tokens: int, parts: Sequence[tuple[torch.Tensor, SparseTargets | BucketedTargets]]) -> dict:
    """The chunks of all parts, none of which has another's number."""
    with_chunks = [(where, t) for where, t in parts if getattr(t, "chunk_N", None) is not None]
    if not with_chunks:
        return {}
    chunk_M, logp_M, used = torch.full((tokens,), -1), torch.zeros(tokens), 0
    for where, targets in with_chunks:
        chunk_M[where] = torch.where(targets.chunk_N < 0, -1, targets.chunk_N + used)
        logp_M[where] = targets.chunk_logprobs_N
        used += int(targets.chunk_N.max()) + 1
    return {"chunk_N": chunk_M, "chunk_logprobs_N": logp_M}


def _groups(targets: SparseTargets | BucketedTargets) -> torch.Tensor:
    if isinstance(targets, BucketedTargets):
        return targets.group_NK
    each_K = torch.arange(targets.ids_NK.shape[1]).expand_as(targets.ids_NK)
    return each_K.masked_fill(targets.padded_NK, -1)


def hold_out(data: TraceData, traces: int, seed: int) -> tuple[TraceData, TraceData | None]:
    """(the rest, examples of whole prompts with at least `traces` traces): no prompt is on both sides.

    Which prompts depends on seed and keys alone. None for 0 traces; DataError when nothing would be left to train on.
    """
    if not traces:
        return data, None
    prompts: dict[str, list[Example]] = {}
    for example in data.examples:
        prompts.setdefault(example.key.split("/")[0], []).append(example)
    order = sorted(prompts, key=lambda key: hashlib.sha256(f"{seed}/held out/{key}".encode()).digest())
    sizes = np.cumsum([len({example.key for example in prompts[key]}) for key in order])
    count = int(np.searchsorted(sizes, traces)) + 1
    if count >= len(order):
        raise DataError(
            f"{traces} traces are to be held out of {int(sizes[-1])}, and nothing is left to train on",
            where="train.eval_traces",
            remedy="Lower it, or sample more traces.",
        )
    kept_out = set(order[:count])
    sides = ([], [])
    for example in data.examples:
        sides[example.key.split("/")[0] in kept_out].append(example)
    train, held_out = (TraceData(side, data.caches, Counter(data.counts), data.aligned, data.law) for side in sides)
    train.counts["trained_tokens"], train.counts["input_tokens"] = sum(train.trained), sum(train.lengths)
    train.counts["held_out"] = len({example.key for example in held_out.examples})
    return train, held_out
