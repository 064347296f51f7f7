"""What a generate loop draws, kept step by step and handed back row by row.

A step is a column over the active rows, a sample is a row over its steps. Steps are appended as they are, with no work
per token; every few steps `flush` sorts them by owner in one vectorised pass.

Shape legend: A rows of a step, K padded support, N logged tokens, S stored support entries of all of them together.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from distill.records import Sample, SampleRequest, TokenDists
from distill.sampling import Support


@dataclass
class Tokens:
    """N tokens with, when captured, their supports: support_N entries of ids_S and logprobs_S each."""

    sampled_N: np.ndarray
    support_N: np.ndarray | None = None
    ids_S: np.ndarray | None = None
    logprobs_S: np.ndarray | None = None
    tail_N: np.ndarray | None = None
    logsumexp_N: np.ndarray | None = None

    @staticmethod
    def of(sampled_N: np.ndarray, support: Support | None) -> "Tokens":
        if support is None:
            return Tokens(sampled_N)
        count_N, ids_NK = support.count_A.cpu().numpy(), support.ids_AK.cpu().numpy()
        stored_NK = np.arange(ids_NK.shape[1]) < count_N[:, None]
        return Tokens(
            sampled_N,
            count_N,
            ids_NK[stored_NK],
            support.logprobs_AK.cpu().numpy()[stored_NK],
            support.tail_A.cpu().numpy(),
            support.logsumexp_A.cpu().numpy(),
        )

    @staticmethod
    def concatenate(parts: list["Tokens"]) -> "Tokens":
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Tokens))
        return Tokens(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def permuted(self, order_N: np.ndarray) -> "Tokens":
        if self.support_N is None:
            return Tokens(self.sampled_N[order_N])
        count_N = self.support_N[order_N]
        old_start_N = (np.cumsum(self.support_N) - self.support_N)[order_N]
        new_start_N = np.cumsum(count_N) - count_N
        entry_S = np.arange(count_N.sum()) + np.repeat(old_start_N - new_start_N, count_N)
        ids_S, logprobs_S = self.ids_S[entry_S], self.logprobs_S[entry_S]
        return Tokens(
            self.sampled_N[order_N], count_N, ids_S, logprobs_S, self.tail_N[order_N], self.logsumexp_N[order_N]
        )

    def split(self, bounds: np.ndarray) -> list["Tokens"]:
        """The stretches of tokens between consecutive bounds."""
        if self.support_N is None:
            return [Tokens(self.sampled_N[lo:hi]) for lo, hi in pairwise(bounds.tolist())]
        entries = np.concatenate(([0], np.cumsum(self.support_N)))[bounds]
        stretches = zip(pairwise(bounds.tolist()), pairwise(entries.tolist()))
        return [
            Tokens(
                self.sampled_N[lo:hi],
                self.support_N[lo:hi],
                self.ids_S[first:last],
                self.logprobs_S[first:last],
                self.tail_N[lo:hi],
                self.logsumexp_N[lo:hi],
            )
            for (lo, hi), (first, last) in stretches
        ]

    def dists(self) -> TokenDists:
        return TokenDists(
            offsets_T1=np.concatenate(([0], np.cumsum(self.support_N, dtype=np.int64))),
            ids_S=self.ids_S,
            logprobs_S=self.logprobs_S,
            tail_T=self.tail_N,
            logsumexp_T=self.logsumexp_N,
            sampled_T=self.sampled_N.astype(np.int32),
        )


@dataclass
class Drawn:
    """What became of one row since it was last told of: the tokens drawn, and, if it ended, why.

    finish_reason: "stop", "length" or None while it goes on; stop: the stop text that ended it, if one did.
    """

    owner: int
    request: SampleRequest
    token_ids: list[int]
    dists: TokenDists | None = None
    finish_reason: str | None = None
    stop: str | None = None


class StepLog:
    """Open rows of a generate loop. Owners are small integers given out by `open`.

    A row is told of once, when it ends; a live one every time. Rows with and without distributions are kept apart, so
    that those without cost nothing more.
    """

    def __init__(self):
        self._requests: dict[int, SampleRequest] = {}
        self._stretches: dict[int, list[Tokens]] = {}
        self._live: set[int] = set()
        self._finished: dict[int, tuple[str, str | None]] = {}
        self._steps: dict[bool, list[tuple[np.ndarray, np.ndarray, Support | None]]] = {False: [], True: []}
        self._next_owner = 0
        self.pending_steps = 0

    def open(self, request: SampleRequest, live: bool = False) -> int:
        owner, self._next_owner = self._next_owner, self._next_owner + 1
        self._requests[owner], self._stretches[owner] = request, []
        if live:
            self._live.add(owner)
        return owner

    def add(self, owners_A: np.ndarray, sampled_A: np.ndarray, support: Support | None) -> None:
        """One token of each of these rows; a row always comes with a support, or never."""
        self._steps[support is not None].append((owners_A, sampled_A, support))
        self.pending_steps += 1

    def finish(self, owner: int, reason: str, stop: str | None = None) -> None:
        self._finished[owner] = (reason, stop)

    def drop(self, owner: int) -> None:
        """Forgets a row that nobody waits for."""
        for kept in (self._requests, self._stretches, self._finished):
            kept.pop(owner, None)
        self._live.discard(owner)

    @property
    def has_news(self) -> bool:
        """Whether there is a row to tell of now."""
        return bool(self._finished or self._live)

    def flush(self) -> list[Sample]:
        """The samples finished since the last flush, in the order they finished; for a log without live rows."""
        return [
            Sample(
                drawn.request.key,
                drawn.request.sample_index,
                drawn.request.seed,
                drawn.token_ids,
                drawn.finish_reason,
                drawn.dists,
            )
            for drawn in self.told()
        ]

    def told(self) -> list[Drawn]:
        """The live rows that go on, then those that ended since the last time, in the order they ended."""
        self.pending_steps = 0
        for steps in self._steps.values():
            self._sort(steps)
            steps.clear()
        going = [owner for owner in self._live if owner not in self._finished and self._stretches[owner]]
        told = [self._told(owner) for owner in going]
        for owner in going:
            self._stretches[owner] = []
        finished, self._finished = self._finished, {}
        for owner, (reason, stop) in finished.items():
            told.append(self._told(owner, reason, stop))
            del self._requests[owner], self._stretches[owner]
            self._live.discard(owner)
        return told

    def _sort(self, steps: list[tuple[np.ndarray, np.ndarray, Support | None]]) -> None:
        if not steps:
            return
        owners_N = np.concatenate([owners_A for owners_A, _, _ in steps])
        order_N = np.argsort(owners_N, kind="stable")
        tokens = Tokens.concatenate([Tokens.of(sampled_A, support) for _, sampled_A, support in steps])
        owners_N = owners_N[order_N]
        starts = np.flatnonzero(np.diff(owners_N, prepend=-1))
        stretches = tokens.permuted(order_N).split(np.append(starts, len(owners_N)))
        for owner, stretch in zip(owners_N[starts].tolist(), stretches):
            if owner in self._stretches:
                self._stretches[owner].append(stretch)

    def _told(self, owner: int, reason: str | None = None, stop: str | None = None) -> Drawn:
        tokens = Tokens.concatenate(self._stretches[owner])
        dists = None if tokens.support_N is None else tokens.dists()
        return Drawn(owner, self._requests[owner], tokens.sampled_N.tolist(), dists, reason, stop)
