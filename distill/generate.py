"""The token loop that teachers and students share: continuous batching over slots, and scoring of finished sequences.

A fixed number of slots; a finished row leaves at once and the last active row takes its place, so the active rows are
always slots 0..A-1. Free slots are filled again a group at a time: prompts of like length share a prefill, and samples
of the same prompt in it share its computation. Bookkeeping is numpy over rows; a step reads one [A] tensor back from
the device.

A row brings its own parameters, may be cancelled, and may be told of step by step: `sample` runs one set of requests,
`rows` hands the loop to a service. Either way a row's tokens are the same.

Shape legend: A active rows, N new rows, B distinct prompts of a prefill, P their padded length, T completion tokens,
V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from distill.errors import DataError, ModelError
from distill.records import CaptureSpec, Sample, SampleRequest, SamplingParams, TokenDists
from distill.row_settings import Settings, StopTexts
from distill.sampling import StepLogits, capture_support, draw, uniform
from distill.slots import SlotModel
from distill.step_log import Drawn, StepLog, Tokens

FLUSH_STEPS = 16  # finished samples are handed out this often
REFILL_SHARE = 16  # refill when 1/16 of the slots is free: fewer prefills, each over more prompts
PREFILL_TOKENS = 4096  # padded tokens of one prefill or scoring batch
SCORE_LOGITS = 1 << 23  # logits held at once while scoring


@dataclass(frozen=True)
class Row:
    """One completion to draw, and how. live: its tokens are told of after every step, not only when it ends."""

    request: SampleRequest
    params: SamplingParams
    capture: CaptureSpec | None = None
    live: bool = False


class Generator:
    """Draws and scores completions of one model. `stop_ids` end a completion and belong to it.

    token_bytes: gives the bytes of each id; called once, by the first row with a stop text.
    """

    def __init__(
        self,
        model: SlotModel,
        batch_size: int,
        stop_ids: Iterable[int],
        token_bytes: Callable[[], Sequence[bytes]] | None = None,
    ):
        self.model, self.slots, self._read_bytes = model, batch_size, token_bytes
        stop_ids = sorted(set(stop_ids))
        if stop_ids and not 0 <= stop_ids[0] <= stop_ids[-1] < model.vocab_size:
            raise ModelError(
                f"a stop id is outside the model's {model.vocab_size} tokens",
                value=stop_ids,
                remedy="Give ids of this model's tokenizer.",
            )
        self.is_stop_V = np.zeros(model.vocab_size, dtype=bool)
        self.is_stop_V[stop_ids] = True

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        if self._read_bytes is None:
            raise DataError("stop texts need the bytes of each token", where="stop", remedy="Use stop ids.")
        return self._read_bytes()

    def sample(
        self, requests: Iterable[SampleRequest], params: SamplingParams, capture: CaptureSpec | None = None
    ) -> Iterator[Sample]:
        """Each request's Sample, as rows finish. Tokens depend on (model, request, params), not on the batch.

        Raises DataError for an empty prompt, an id outside the vocabulary, or more tokens than the model's positions.
        """
        waiting = iter(requests)
        with self.rows() as loop:
            while True:
                if loop.wants_rows:
                    while new := list(islice(waiting, loop.free)):
                        loop.admit([Row(request, params, capture) for request in new])
                if not loop.active:
                    break
                loop.step()
                if loop.log.pending_steps >= FLUSH_STEPS:
                    yield from loop.log.flush()
            yield from loop.log.flush()

    def release(self) -> None:
        """Gives back the memory that is kept from one call to the next: none here."""

    @contextmanager
    def rows(self) -> "Iterator[RowLoop]":
        """The loop itself, with no row in it, for whoever feeds it between steps. One at a time."""
        with self.model.session(self.slots):
            yield RowLoop(self)

    def check(self, row: Row, where: str) -> None:
        """Raises DataError if the row cannot run: call it before `admit` where an error must not stop the others."""
        ids = row.request.prompt_ids
        check_ids(ids, len(ids), row.params.max_new_tokens, self.model, where)
        if row.params.stop:
            _ = self.token_bytes

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


class RowLoop:
    """The rows of a generate loop: who owns each slot, how long it is, what was drawn last."""

    def __init__(self, generator: Generator):
        self.generator, self.model, self.slots = generator, generator.model, generator.slots
        self.log = StepLog()
        self.active = 0
        self.owners, self.seeds, self.lengths, self.drawn, self.budget = np.zeros((5, self.slots), dtype=np.int64)
        self.how, self.capture = Settings(self.slots), Settings(self.slots)
        self.done = np.zeros(self.slots, dtype=bool)
        self.last_token = torch.zeros(self.slots, dtype=torch.int64, device=self.model.device)
        self.stops: dict[int, StopTexts] = {}

    @property
    def free(self) -> int:
        return self.slots - self.active

    @property
    def wants_rows(self) -> bool:
        """Whether enough slots are free for a prefill to be worth it."""
        return self.free >= max(1, self.slots // REFILL_SHARE) if self.active else True

    def admit(self, rows: Sequence[Row]) -> list[int]:
        """Prefills these rows, at most `free`, and draws their first tokens; the owner of each, in order."""
        owners = [self.log.open(row.request, row.live) for row in rows]
        by_prompt: dict[tuple[int, ...], list[tuple[int, Row]]] = {}
        for owner, row in zip(owners, rows):
            by_prompt.setdefault(tuple(row.request.prompt_ids), []).append((owner, row))
            if row.params.stop:
                self.stops[owner] = StopTexts(row.params.stop, self.generator.token_bytes)
        for prompts in _length_groups(sorted(by_prompt, key=len), len):
            self._prefill(prompts, [by_prompt[prompt] for prompt in prompts])
        self._release()
        return owners

    def step(self) -> None:
        """One more token for every active row."""
        active = self.active
        lengths_A = torch.from_numpy(self.lengths[:active]).to(self.model.device)
        logits_AV = self.model.decode(self.last_token[:active], lengths_A, int(self.lengths[:active].max()) + 1)
        self.lengths[:active] += 1
        self._draw(slice(0, active), logits_AV)
        self._release()

    def news(self) -> list[Drawn]:
        """What became of the rows, as soon as there is something to tell; call it after every step."""
        return self.log.told() if self.log.has_news or self.log.pending_steps >= FLUSH_STEPS else []

    def cancel(self, owners: Iterable[int]) -> None:
        """Frees the slots of these rows; they are not told of any more."""
        gone = list(owners)
        for owner in gone:
            self.log.drop(owner)
            self.stops.pop(owner, None)
        self.done[: self.active] = np.isin(self.owners[: self.active], gone)
        self._release()

    def _prefill(self, prompts: list[tuple[int, ...]], owned: list[list[tuple[int, Row]]]) -> None:
        sources, lengths = [], [len(prompt) for prompt in prompts]
        for source, shared in enumerate(owned):
            sources += [source] * len(shared)
        rows = slice(self.active, self.active + len(sources))
        for slot, (source, (owner, row)) in enumerate(
            zip(sources, (r for shared in owned for r in shared)), rows.start
        ):
            request, params = row.request, row.params
            check_ids(request.prompt_ids, lengths[source], params.max_new_tokens, self.model, f"prompt {request.key}")
            self.owners[slot], self.seeds[slot] = owner, request.seed
            self.lengths[slot], self.drawn[slot], self.budget[slot] = lengths[source], 0, params.max_new_tokens
            self.how.set(slot, (params.temperature, params.top_p, params.top_k, params.min_p), params)
            self.capture.set(slot, row.capture, row.capture)
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
        token_A = self._choose(step, uniform_A, rows)
        owners_A, drawn_A = self.owners[rows].copy(), None
        for spec, index in self.capture.groups(rows):
            some, tokens_R = (step, token_A) if index is None else _part(step, token_A, index)
            support = capture_support(some, tokens_R, spec) if spec else None
            drawn_A = token_A.cpu().numpy() if drawn_A is None else drawn_A
            chosen = slice(None) if index is None else index
            self.log.add(owners_A[chosen], drawn_A[chosen], support)
        self.last_token[rows] = token_A
        self.drawn[rows] += 1
        self._finish(rows, owners_A, drawn_A)

    def _choose(self, step: StepLogits, uniform_A: Tensor, rows: slice) -> Tensor:
        token_A = None
        for params, index in self.how.groups(rows):
            if index is None:
                return draw(step, uniform_A, params)
            some, uniform_R = _part(step, uniform_A, index)
            token_A = torch.empty_like(uniform_A, dtype=torch.int64) if token_A is None else token_A
            token_A[torch.from_numpy(index).to(token_A.device)] = draw(some, uniform_R, params)
        return token_A

    def _finish(self, rows: slice, owners_A: np.ndarray, drawn_A: np.ndarray) -> None:
        stopped_A = self.generator.is_stop_V[drawn_A]
        ended_A = stopped_A | (self.drawn[rows] >= self.budget[rows])
        texts = self._stop_texts(owners_A, np.where(stopped_A, -1, drawn_A)) if self.stops else {}
        ended_A[list(texts)] = True
        self.done[rows] = ended_A
        for a in np.flatnonzero(ended_A).tolist():
            owner = int(owners_A[a])
            self.stops.pop(owner, None)
            self.log.finish(owner, "stop" if stopped_A[a] or a in texts else "length", texts.get(a))

    def _stop_texts(self, owners_A: np.ndarray, drawn_A: np.ndarray) -> dict[int, str]:
        """Row -> the stop text that its new token completes; a token of -1 is left out."""
        watched = ((a, self.stops.get(owner)) for a, owner in enumerate(owners_A.tolist()))
        found = {a: stop.add(int(drawn_A[a])) for a, stop in watched if stop and drawn_A[a] >= 0}
        return {a: text for a, text in found.items() if text is not None}

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
        for column in (
            self.owners,
            self.seeds,
            self.lengths,
            self.drawn,
            self.budget,
            self.how.of_S,
            self.capture.of_S,
        ):
            column[holes] = column[movers]
        to_M, from_M = (torch.from_numpy(index).to(self.model.device) for index in (holes, movers))
        self.last_token[to_M] = self.last_token[from_M]
        self.model.move(to_M, from_M, int(self.lengths[holes].max()))


def _part(step: StepLogits, per_row_A: Tensor, index: np.ndarray) -> tuple[StepLogits, Tensor]:
    index_R = torch.from_numpy(index).to(per_row_A.device)
    return step.rows(index_R), per_row_A[index_R]


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
