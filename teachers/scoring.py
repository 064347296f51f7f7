"""Distributions of given sequences over the paged forward pass: what sequences have in common is computed once.

Sequences are sorted by their tokens, so that those with a common beginning stand together. A family shares its first
tokens, at most up to the last but one of its shortest prompt: they go through the model once and leave their latents in
pages that all members read; then the members' own tokens follow. No shared token is scored, so a score does not depend
on who shares, but for the rounding of products over other shapes.

Results of one forward pass travel to the host while the next one runs. The head is applied to a chunk of positions at a
time: more logits than SCORE_LOGITS never exist.

Shape legend: T tokens of a pass, N scored positions, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

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
        ids, prompts = [(*prompt, *completion) for prompt, completion in sequences], [len(one) for one, _ in sequences]
        for one, prompt in zip(ids, prompts):
            check_ids(one, prompt, 0, self.runner, "a sequence to score")
        scored: list[TokenDists | None] = [None] * len(ids)
        late = None  # the pass whose result is on its way while the next one is computed
        for members, pool in self._passes(ids, prompts):
            now = members, self._parts(members, pool, ids, prompts, capture)
            if late:
                _take(*late, ids, prompts, scored)
            late = now
        if late:
            _take(*late, ids, prompts, scored)
        return scored

    def _passes(self, ids: list[tuple[int, ...]], prompts: list[int]) -> Iterator[tuple[list[Member], PagePool | None]]:
        """Members to compute together, shortest first; before the first of a family, what the family shares."""
        found = families(ids, prompts)
        alone = [Member(i) for family in found if not family.shared for i in family.members]
        related = sorted((family for family in found if family.shared), key=lambda family: family.shared)
        own = lambda member: len(ids[member.index]) - member.past  # noqa: E731
        for some in _within(related, lambda family: family.shared):
            pool, members = self._share(some, ids)
            for together in _within(sorted(members, key=lambda one: (own(one), one.past)), own):
                yield together, pool
        for together in _within(sorted(alone, key=own), own):
            yield together, None

    def _share(self, some: list[Family], ids: list[tuple[int, ...]]) -> tuple[PagePool, list[Member]]:
        """A pool with the latents of what these families share, and their members."""
        runner, page = self.runner, self.page_tokens
        prefixes = [ids[family.members[0]][: family.shared] for family in some]
        pages = sum(-(-len(prefix) // page) for prefix in prefixes)
        pool = PagePool(
            len(runner.layers), 1 + pages, runner.entry_size, dtype=runner.dtype, device=runner.device, page_tokens=page
        )
        slots = [pool.slots(pool.take(pool.pages_for(len(prefix))), 0, len(prefix)) for prefix in prefixes]
        segments, start = [], 0
        for prefix in prefixes:
            segments.append(Segment(start, len(prefix)))
            start += len(prefix)
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
        self, members: list[Member], pool: PagePool | None, ids: list[tuple[int, ...]], prompts: list[int],
        capture: CaptureSpec,
    ) -> list[Callable[[], Tokens]]:  # fmt: skip
        """Computes a pass; functions that give its Tokens, stretch by stretch, waiting for them on a GPU."""
        new, positions, segments, where = [], [], [], []
        for member in members:
            whole, first = ids[member.index], len(new) - member.past  # where its token 0 would be in the list
            segments.append(Segment(len(new), len(whole) - member.past, member.slots))
            new += whole[member.past :]
            positions.append(np.arange(member.past, len(whole)))
            where.append(np.arange(prompts[member.index] - 1, len(whole) - 1) + first)
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


def families(ids: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[Family]:
    """Every sequence once, with those that share a beginning; in the order of their tokens.

    A sequence joins the family of the one before it in that order while this saves more tokens than it loses to the
    members that share more.
    """
    order, arrays = sorted(range(len(ids)), key=ids.__getitem__), [np.asarray(one) for one in ids]
    found: list[Family] = []
    for i in order:
        most = prompts[i] - 1  # the token before the first that is scored is its own
        if found:
            last = found[-1]
            shared = min(last.shared, most, _common(arrays[last.members[-1]], arrays[i]))
            if shared >= LEAST_SHARED and shared * len(last.members) >= last.shared * (len(last.members) - 1):
                last.members.append(i)
                last.shared = shared
                continue
        found.append(Family([i], most))
    for family in found:
        if len(family.members) == 1:
            family.shared = 0
    return found


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


def _take(
    members: list[Member], parts: list, ids: list[tuple[int, ...]], prompts: list[int], scored: list[TokenDists | None]
) -> None:
    """Reads a pass's result and hands every member its own."""
    bounds = np.cumsum([0, *(len(ids[member.index]) - prompts[member.index] for member in members)])
    if bounds[-1] == 0:
        for member in members:
            scored[member.index] = _nothing()
        return
    for member, stretch in zip(members, Tokens.concatenate([read() for read in parts]).split(bounds)):
        scored[member.index] = stretch.dists()


def _nothing() -> TokenDists:
    whole, real = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    return TokenDists(np.zeros(1, dtype=np.int64), whole, real, real, real, whole)
