"""The token loop that teachers and students share: continuous batching over slots, and scoring of finished sequences.

A fixed number of slots; a finished row leaves at once and the last active row takes its place, so the active rows are
always slots 0..A-1. Free slots are filled again a group at a time: prompts of like length share a prefill, and samples
of the same prompt in it share its computation. Bookkeeping is numpy over rows; a step reads one [A] tensor back from
the device.

Shape legend: A active rows, N new rows, B distinct prompts of a prefill, P their padded length, T completion tokens,
V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from distill.errors import DataError, ModelError
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists
from distill.sampling import StepLogits, capture_support, draw, uniform
from distill.slots import SlotModel
from distill.step_log import StepLog, Tokens

FLUSH_STEPS = 16  # finished samples are handed out this often
REFILL_SHARE = 16  # refill when 1/16 of the slots is free: fewer prefills, each over more prompts
PREFILL_TOKENS = 4096  # padded tokens of one prefill or scoring batch
SCORE_LOGITS = 1 << 23  # logits held at once while scoring


class Generator:
    """Draws and scores completions of one model. `stop_ids` end a completion and belong to it."""

    def __init__(self, model: SlotModel, batch_size: int, stop_ids: Iterable[int]):
        self.model, self.slots = model, batch_size
        stop_ids = sorted(set(stop_ids))
        if stop_ids and not 0 <= stop_ids[0] <= stop_ids[-1] < model.vocab_size:
            raise ModelError(
                f"a stop id is outside the model's {model.vocab_size} tokens",
                value=stop_ids,
                remedy="Give ids of this model's tokenizer.",
            )
        self.is_stop_V = np.zeros(model.vocab_size, dtype=bool)
        self.is_stop_V[stop_ids] = True

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """Each request's Sample, as rows finish. Tokens depend on (model, request, params), not on the batch.

        Raises DataError for an empty prompt, an id outside the vocabulary, or more tokens than the model's positions.
        """
        with self.model.session(self.slots):
            loop = _Loop(self, params, capture)
            waiting = iter(requests)
            while loop.refill(waiting) or loop.active:
                loop.step()
                if loop.log.pending_steps >= FLUSH_STEPS:
                    yield from loop.log.flush()
            yield from loop.log.flush()

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of every completion token of (prompt_ids, completion_ids) pairs, in the order given."""
        scored: list[TokenDists | None] = [None] * len(sequences)
        by_length = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
        with self.model.session():
            for batch in _length_groups(by_length, lambda i: sum(map(len, sequences[i]))):
                for i, dists in zip(batch, self._score_batch([sequences[i] for i in batch], capture)):
                    scored[i] = dists
        return scored

    def _score_batch(self, pairs: list[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        for prompt_ids, completion_ids in pairs:
            check_ids((*prompt_ids, *completion_ids), len(prompt_ids), 0, self.model, "a sequence to score")
        ids_BP, _ = _padded([(*prompt_ids, *completion_ids) for prompt_ids, completion_ids in pairs], self.model.device)
        hidden_BPE = self.model.hidden(ids_BP)
        before_T = [np.arange(len(c)) + len(p) - 1 for p, c in pairs]  # the position that predicts each token
        row_T = np.repeat(np.arange(len(pairs)), [len(c) for _, c in pairs])
        where_T = torch.from_numpy(row_T * ids_BP.shape[1] + np.concatenate(before_T)).to(self.model.device)
        bounds = np.cumsum([0, *(len(c) for _, c in pairs)])
        sampled_T = ids_BP.flatten()[where_T + 1] if len(where_T) else where_T
        chunk = max(1, SCORE_LOGITS // self.model.vocab_size)
        parts = [
            self._score_chunk(hidden_BPE.flatten(0, 1)[where], sampled, capture)
            for where, sampled in zip(where_T.split(chunk), sampled_T.split(chunk))
        ]
        return [stretch.dists() for stretch in Tokens.concatenate(parts).split(bounds)]

    @torch.inference_mode()
    def _score_chunk(self, hidden_TE: Tensor, sampled_T: Tensor, capture: CaptureSpec) -> Tokens:
        support = capture_support(StepLogits(self.model.logits(hidden_TE)), sampled_T, capture)
        return Tokens.of(sampled_T.cpu().numpy(), support)


class _Loop:
    """The rows of one `sample` call: who owns each slot, how long it is, what was drawn last."""

    def __init__(self, generator: Generator, params: SamplingParams, capture: CaptureSpec | None):
        self.model, self.slots, self.is_stop_V = generator.model, generator.slots, generator.is_stop_V
        self.params, self.capture, self.log = params, capture, StepLog()
        self.active = 0
        self.owners, self.seeds, self.lengths, self.drawn = np.zeros((4, self.slots), dtype=np.int64)
        self.done = np.zeros(self.slots, dtype=bool)
        self.last_token = torch.zeros(self.slots, dtype=torch.int64, device=self.model.device)

    def step(self) -> None:
        """One more token for every active row."""
        active = self.active
        lengths_A = torch.from_numpy(self.lengths[:active]).to(self.model.device)
        logits_AV = self.model.decode(self.last_token[:active], lengths_A, int(self.lengths[:active].max()) + 1)
        self.lengths[:active] += 1
        self._draw(slice(0, active), logits_AV)
        self._release()

    def refill(self, waiting: Iterator[SampleRequest]) -> bool:
        """Fills free slots with waiting requests when enough are free; whether any row is left to step."""
        free = self.slots - self.active
        if self.active and free < max(1, self.slots // REFILL_SHARE):
            return True
        while free := self.slots - self.active:
            new = list(islice(waiting, free))
            if not new:
                break
            self._admit(new)
        return self.active > 0

    def _admit(self, requests: list[SampleRequest]) -> None:
        by_prompt: dict[tuple[int, ...], list[SampleRequest]] = {}
        for request in requests:
            by_prompt.setdefault(tuple(request.prompt_ids), []).append(request)
        for prompts in _length_groups(sorted(by_prompt, key=len), len):
            self._prefill(prompts, [by_prompt[prompt] for prompt in prompts])
        self._release()

    def _prefill(self, prompts: list[tuple[int, ...]], requests: list[list[SampleRequest]]) -> None:
        sources, lengths = [], [len(prompt) for prompt in prompts]
        for source, shared in enumerate(requests):
            sources += [source] * len(shared)
        rows = slice(self.active, self.active + len(sources))
        for row, (source, request) in enumerate(zip(sources, (r for shared in requests for r in shared)), rows.start):
            check_ids(
                request.prompt_ids, lengths[source], self.params.max_new_tokens, self.model, f"prompt {request.key}"
            )
            self.owners[row], self.seeds[row] = self.log.open(request), request.seed
            self.lengths[row], self.drawn[row] = lengths[source], 0
        ids_BP, lengths_B = _padded(prompts, self.model.device)
        slots_N = torch.arange(rows.start, rows.stop, device=self.model.device)
        source_N = torch.tensor(sources, device=self.model.device)
        logits_BV = self.model.prefill(ids_BP, lengths_B, slots_N, source_N)
        self.active = rows.stop
        self._draw(rows, logits_BV[source_N])

    @torch.inference_mode()
    def _draw(self, rows: slice, logits_AV: Tensor) -> None:
        """Draws, logs and stores one token for these rows; marks the rows that end with it."""
        step = StepLogits(logits_AV)
        uniform_A = torch.from_numpy(uniform(self.seeds[rows], self.drawn[rows])).to(logits_AV.device)
        token_A = draw(step, uniform_A, self.params)
        support = capture_support(step, token_A, self.capture) if self.capture else None
        self.last_token[rows] = token_A
        token_A = token_A.cpu().numpy()
        self.log.add(self.owners[rows].copy(), token_A, support)
        self.drawn[rows] += 1
        stopped_A = self.is_stop_V[token_A]
        self.done[rows] = stopped_A | (self.drawn[rows] >= self.params.max_new_tokens)
        for row in np.flatnonzero(self.done[rows]):
            self.log.finish(int(self.owners[rows][row]), "stop" if stopped_A[row] else "length")

    def _release(self) -> None:
        """Frees the rows that are done; active rows from the end take their slots."""
        done = self.done[: self.active]
        left = self.active - int(done.sum())
        if left == self.active:
            return
        holes, movers = np.flatnonzero(done[:left]), left + np.flatnonzero(~done[left:])
        self.done[: self.active] = False
        self.active = left
        if not len(holes):
            return
        for column in (self.owners, self.seeds, self.lengths, self.drawn):
            column[holes] = column[movers]
        to_M, from_M = (torch.from_numpy(index).to(self.model.device) for index in (holes, movers))
        self.last_token[to_M] = self.last_token[from_M]
        self.model.move(to_M, from_M, int(self.lengths[holes].max()))


def _length_groups(items: list, length) -> Iterator[list]:
    """Runs of items (sorted by length) whose padded size is near their own and within PREFILL_TOKENS."""
    group: list = []
    for item in items:
        size = length(item)
        if group and (size * (len(group) + 1) > PREFILL_TOKENS or size > 1.5 * length(group[0]) + 16):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _padded(sequences: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, P], zeros after each sequence's end, and lengths [B]."""
    lengths_B = np.array([len(ids) for ids in sequences])
    ids_BP = np.zeros((len(sequences), lengths_B.max()), dtype=np.int64)
    ids_BP[np.arange(ids_BP.shape[1]) < lengths_B[:, None]] = np.concatenate(sequences)
    return torch.from_numpy(ids_BP).to(device), torch.from_numpy(lengths_B).to(device)


def check_ids(ids: Sequence[int], prompt_tokens: int, new_tokens: int, model: SlotModel, where: str) -> None:
    """Raises DataError unless these ids, and new_tokens more, can be run through the model."""
    if prompt_tokens == 0:
        raise DataError("the prompt has no tokens", where=where, remedy="Give it at least one token.")
    if not 0 <= min(ids) <= max(ids) < model.vocab_size:
        raise DataError(
            f"a token id is outside the model's {model.vocab_size} tokens",
            where=where,
            value=max(ids) if min(ids) >= 0 else min(ids),
            remedy="Encode it with this model's tokenizer.",
        )
    if len(ids) + new_tokens > model.max_positions:
        raise DataError(
            f"{len(ids)} tokens and max_new_tokens {new_tokens} exceed the model's {model.max_positions} positions",
            where=where,
            remedy=f"Use max_new_tokens of at most {max(0, model.max_positions - len(ids))}, or drop the prompt.",
        )
