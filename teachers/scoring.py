"""Distributions of given sequences over the paged forward pass: what sequences have in common is computed once.

Prompts are sorted by their tokens, so that those with a common beginning stand together. A family shares its first
tokens, at most up to the last but one of its shortest prompt: they go through the model once and leave their latents in
pages that all members read; then the members' own tokens follow. No shared token is scored, so a score does not depend
on who shares, but for the rounding of products over other shapes.

Results of one forward pass travel to the host while the next one runs. The head is applied to a chunk of positions at a
time: more logits than SCORE_LOGITS never exist.

Shape legend: T tokens of a pass, N scored positions, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distill.generate import check_ids
from distill.records import CaptureSpec, TokenDists
from distill.sampling import StepLogits, capture_support
from distill.step_log import Tokens
from teachers.paged import PagePool
from teachers.runner import Runner, Segment
from teachers.steps import unpack
from teachers.tail import with_draws
from teachers.transfer import to_device, to_host

SCORE_TOKENS = 16384  # of one forward pass
SCORE_LOGITS = 1 << 28  # logits held at once on a GPU: 1 GiB
SCORE_LOGITS_CPU = 1 << 23
DRAWING_SHARE = 8  # draws from tails need so many times the memory of the logits
LEAST_SHARED = 32  # tokens that are worth a pass of their own
TILE = 128  # positions of a product's tile: chunks of whole tiles waste none

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass
class Family:
    """Sequences, by index, whose first `shared` tokens are the same."""

    members: list[int]
    shared: int


@dataclass
class Member:
    """A sequence of a forward pass: its first `past` tokens lie in `slots` of the pass's pool."""

    index: int
    past: int = 0
    slots: Tensor | None = None


class Scorer:
    """Scores over one model. `shared_tokens`: tokens that were not computed again because another sequence had them."""

    def __init__(self, runner: Runner, page_tokens: int):
        self.runner, self.page_tokens, self.shared_tokens = runner, page_tokens, 0

    def score(self, sequences: Sequence[Pair], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of every completion token of (prompt_ids, completion_ids) pairs, in the order given."""
        scored: list[TokenDists | None] = [None] * len(sequences)
        late = None  # the pass whose result is on its way while the next one is computed
        for members, pool in self._passes(sequences):
            now = members, self._parts(members, pool, sequences, capture)
            if late:
                _take(*late, sequences, scored)
            late = now
        if late:
            _take(*late, sequences, scored)
        return scored

    def _passes(self, sequences: Sequence[Pair]) -> Iterator[tuple[list[Member], PagePool | None]]:
        """Members to compute together, shortest first; before the first of a family, what the family shares."""
        found = families([prompt for prompt, _ in sequences])
        alone = [Member(i) for family in found if not family.shared for i in family.members]
        related = sorted((family for family in found if family.shared), key=lambda family: family.shared)
        own = lambda member: sum(map(len, sequences[member.index])) - member.past  # noqa: E731
        for some in _within(related, lambda family: family.shared):
            pool, members = self._share(some, sequences)
            for together in _within(sorted(members, key=lambda one: (own(one), one.past)), own):
                yield together, pool
        for together in _within(sorted(alone, key=own), own):
            yield together, None

    def _share(self, some: list[Family], sequences: Sequence[Pair]) -> tuple[PagePool, list[Member]]:
        """A pool with the latents of what these families share, and their members."""
        runner, page = self.runner, self.page_tokens
        prefixes = [sequences[family.members[0]][0][: family.shared] for family in some]
        for prefix in prefixes:
            check_ids(prefix, len(prefix), 0, runner, "a sequence to score")
        pages = sum(-(-len(prefix) // page) for prefix in prefixes)
        pool = PagePool(
            len(runner.layers), 1 + pages, runner.entry_size, dtype=runner.dtype, device=runner.device, page_tokens=page
        )
        slots = [pool.slots(pool.take(pool.pages_for(len(prefix))), 0, len(prefix)) for prefix in prefixes]
        starts = np.cumsum([0, *map(len, prefixes)]).tolist()
        segments = [Segment(start, len(prefix)) for start, prefix in zip(starts, prefixes)]
        positions = np.concatenate([np.arange(len(prefix)) for prefix in prefixes])
        self._forward(np.concatenate(prefixes), positions, segments, pool, np.concatenate(slots))
        self.shared_tokens += sum(family.shared * (len(family.members) - 1) for family in some)
        on_device = [to_device(own, runner.device) for own in slots]
        return pool, [Member(i, one.shared, own) for one, own in zip(some, on_device) for i in one.members]

    def _forward(
        self, ids: np.ndarray, positions: np.ndarray, segments: list[Segment], pool: PagePool | None, slots: np.ndarray
    ) -> tuple[Tensor, tuple]:
        """The new tokens' ids [T] on the device and the residual parts after the last layer."""
        device = self.runner.device
        ids_T, positions_T = (to_device(array.astype(np.int32), device) for array in (ids, positions))
        slots_T = to_device(slots, device) if pool else None
        return ids_T, self.runner.prefill(ids_T, positions_T, segments, pool, slots_T)

    def _parts(
        self, members: list[Member], pool: PagePool | None, sequences: Sequence[Pair], capture: CaptureSpec
    ) -> list[Callable[[], Tokens]]:
        """Computes a pass; functions that give its Tokens, stretch by stretch, waiting for them on a GPU."""
        new, positions, segments, where = [], [], [], []
        for member in members:
            prompt, completion = sequences[member.index]
            whole, first = (*prompt, *completion), len(new) - member.past  # where its token 0 would be in the list
            check_ids(whole, len(prompt), 0, self.runner, "a sequence to score")
            segments.append(Segment(len(new), len(whole) - member.past, member.slots))
            new += whole[member.past :]
            positions.append(np.arange(member.past, len(whole)))
            where.append(np.arange(len(prompt) - 1, len(whole) - 1) + first)
        nowhere = np.zeros(len(new), dtype=np.int64)  # nobody reads these tokens' latents again: page 0
        ids_T, parts = self._forward(np.array(new), np.concatenate(positions), segments, pool, nowhere)
        where_N = to_device(np.concatenate(where), self.runner.device)
        if not len(where_N):
            return []
        hidden_NE, sampled_N, chunk = self.runner.finish(parts, where_N), ids_T[where_N + 1], self._chunk(capture)
        return [self._support(*part, capture) for part in zip(hidden_NE.split(chunk), sampled_N.split(chunk))]

    def _chunk(self, capture: CaptureSpec) -> int:
        limit = SCORE_LOGITS if self.runner.device.type == "cuda" else SCORE_LOGITS_CPU
        positions = limit // (self.runner.vocab_size * (DRAWING_SHARE if capture.tail_draws else 1))
        return max(1, positions // TILE * TILE or positions)

    @torch.inference_mode()
    def _support(self, hidden_NE: Tensor, sampled_N: Tensor, capture: CaptureSpec) -> Callable[[], Tokens]:
        logits_NV = self.runner.logits(hidden_NE)
        if self.runner.device.type != "cuda":
            tokens = Tokens.of(sampled_N.numpy(), capture_support(StepLogits(logits_NV), sampled_N.long(), capture))
            return lambda: tokens
        from teachers.kernels import draw

        wanted = lambda value, dtype: torch.full_like(sampled_N, value, dtype=dtype)  # noqa: E731
        how = draw.HowCaptured(wanted(capture.k_max, torch.int32), wanted(capture.tail_bound, torch.float32))
        packed_NW = draw.step(logits_NV, sampled_N, None, how, draw.width(capture.k_max, self.runner.vocab_size))
        if capture.tail_draws:
            packed_NW = with_draws(packed_NW, logits_NV, capture.tail_draws)
        read = to_host(packed_NW)
        return lambda: Tokens.of(*unpack(read()))


def families(prompts: Sequence[Sequence[int]]) -> list[Family]:
    """Every prompt once, with those that share a beginning; a family's in the order of their tokens.

    Neighbours in that order join from the longest common beginning down, as long as this saves no fewer tokens: those
    who join a family make all of it share what they share.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):  # a prompt's last token is its own: what follows it is scored
        start = tuple(prompt[:LEAST_SHARED]) if len(prompt) > LEAST_SHARED else (-1 - i,)
        alike.setdefault(start, []).append(i)
    return [family for some in alike.values() for family in _families(some, prompts)]


def _families(some: list[int], prompts: Sequence[Sequence[int]]) -> list[Family]:
    """Of prompts that begin alike."""
    if len(some) == 1:
        return [Family(some, 0)]
    order = sorted(some, key=lambda i: tuple(prompts[i]))
    arrays = [np.asarray(prompts[i]) for i in order]
    shared = [_common(one[:-1], other[:-1]) for one, other in pairwise(arrays)]
    owner = [Family([k], 0) for k in range(len(order))]
    saved = lambda family: family.shared * (len(family.members) - 1)  # noqa: E731
    for k in sorted(range(len(shared)), key=lambda k: -shared[k]):
        left, right = owner[k], owner[k + 1]
        together = len(left.members) + len(right.members) - 1
        if shared[k] * together >= saved(left) + saved(right):
            left.members += right.members
            left.shared = shared[k]
            for member in right.members:
                owner[member] = left
    found = [family for k, family in enumerate(owner) if family.members[0] == k]
    return [Family([order[k] for k in family.members], family.shared) for family in found]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _within(items: Iterable, tokens: Callable[[object], int]) -> Iterator[list]:
    """Runs of items of at most SCORE_TOKENS tokens, or one that is longer."""
    some: list = []
    total = 0
    for item in items:
        if some and total + tokens(item) > SCORE_TOKENS:
            yield some
            some, total = [], 0
        some.append(item)
        total += tokens(item)
    if some:
        yield some


def _take(members: list[Member], parts: list, sequences: Sequence[Pair], scored: list[TokenDists | None]) -> None:
    """Reads a pass's result and hands every member its own."""
    bounds = np.cumsum([0, *(len(sequences[member.index][1]) for member in members)])
    if bounds[-1] == 0:
        for member in members:
            scored[member.index] = _nothing()
        return
    for member, stretch in zip(members, Tokens.concatenate([read() for read in parts]).split(bounds)):
        scored[member.index] = stretch.dists()


def _nothing() -> TokenDists:
    whole, real = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    return TokenDists(np.zeros(1, dtype=np.int64), whole, real, real, real, whole)
