"""What a generate loop draws, kept step by step and handed back sample by sample.

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


class StepLog:
    """Open samples of a generate loop. Owners are small integers given out by `open`."""

    def __init__(self):
        self._requests: dict[int, SampleRequest] = {}
        self._stretches: dict[int, list[Tokens]] = {}
        self._finished: list[tuple[int, str]] = []
        self._steps: list[tuple[np.ndarray, np.ndarray, Support | None]] = []
        self._next_owner = 0

    def open(self, request: SampleRequest) -> int:
        owner, self._next_owner = self._next_owner, self._next_owner + 1
        self._requests[owner], self._stretches[owner] = request, []
        return owner

    def add(self, owners_A: np.ndarray, sampled_A: np.ndarray, support: Support | None) -> None:
        self._steps.append((owners_A, sampled_A, support))

    def finish(self, owner: int, reason: str) -> None:
        self._finished.append((owner, reason))

    @property
    def pending_steps(self) -> int:
        return len(self._steps)

    def flush(self) -> list[Sample]:
        """The samples finished since the last flush, in the order they finished."""
        if self._steps:
            owners_N = np.concatenate([owners_A for owners_A, _, _ in self._steps])
            order_N = np.argsort(owners_N, kind="stable")
            tokens = Tokens.concatenate([Tokens.of(sampled_A, support) for _, sampled_A, support in self._steps])
            owners_N = owners_N[order_N]
            starts = np.flatnonzero(np.diff(owners_N, prepend=-1))
            stretches = tokens.permuted(order_N).split(np.append(starts, len(owners_N)))
            for owner, stretch in zip(owners_N[starts].tolist(), stretches):
                self._stretches[owner].append(stretch)
            self._steps = []
        finished, self._finished = self._finished, []
        return [self._close(owner, reason) for owner, reason in finished]

    def _close(self, owner: int, reason: str) -> Sample:
        request, tokens = self._requests.pop(owner), Tokens.concatenate(self._stretches.pop(owner))
        dists = None if tokens.support_N is None else tokens.dists()
        return Sample(request.key, request.sample_index, request.seed, tokens.sampled_N.tolist(), reason, dists)
