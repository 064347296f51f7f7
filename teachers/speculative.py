"""Speculative decoding with a multi-token prediction module: two tokens a row and step, and not one of them different.

A row is its last token, which is not cached yet, and a guess at the next. A step runs both through the model as two
rows of one batch and draws from both distributions, each with the random number of its own position: the first draw is
what a step without guesses would have drawn. If it is the guess, the second draw is what the next step would have
drawn, and the row moves on by two tokens; if not, the second is dropped and its latents are overwritten by the next
step. So tokens and distributions are those of teachers.scheduler for any temperature and filters, whatever the module
says: it only decides how many are drawn at once. (Rejection sampling accepts somewhat more often, but draws other
tokens from the same law.)

The guess itself is drawn from the module's distribution with the row's own settings and the random number that the
token it guesses will be drawn with: where the module is right about the distribution, it is right about the token.

The host reads every step before the next: only then does it know how many tokens a row has.

Shape legend: A active rows, B rows of a graph, C = 2 B their tokens, N new rows, E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import ModelError
from distill.generate import Row
from teachers.mtp import MtpRunner, load
from teachers.paged import PagePool
from teachers.runner import unsupported
from teachers.running import Prompt
from teachers.sampler import PagedGenerator
from teachers.scheduler import PagedRows
from teachers.steps import Steps, rows_of
from teachers.transfer import to_device


class SpeculativeGenerator(PagedGenerator):
    """Draws as PagedGenerator does, and faster. `guessed` and `right`: the guesses so far, and those that held."""

    runner: MtpRunner

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.guessed = self.right = 0

    @property
    def counts(self) -> dict[str, int]:
        return super().counts | {"guesses": self.guessed, "guesses_right": self.right}

    @property
    def _cached_layers(self) -> int:
        return super()._cached_layers + 1

    def _new_steps(self) -> "SpeculativeSteps":
        return SpeculativeSteps(self.runner, self.pool, self.slots)

    def _new_loop(self) -> "SpeculativeRows":
        return SpeculativeRows(self, self.pool, self.steps, lag=0)


class SpeculativeSteps(Steps):
    """The device's side: besides the rows' last tokens, a guess at the token after each."""

    runner: MtpRunner
    ahead = 2

    def __init__(self, runner: MtpRunner, pool: PagePool, slots: int):
        super().__init__(runner, pool, slots)
        self.guesses = torch.zeros_like(self.tokens)

    def upload(self, rows: list, order: np.ndarray, *args) -> None:
        self.guesses[: len(order)] = self.guesses[to_device(order, self.runner.device)]
        super().upload(rows, order, *args)

    @torch.inference_mode()
    def guess(self, hidden_NE: Tensor, places: slice, lengths: np.ndarray, drawn: np.ndarray) -> None:
        """Guesses of rows that join: hidden_NE, the final hidden states of the tokens before their last ones.

        lengths: cached tokens of each; drawn: tokens that were drawn of each.
        """
        runner, device = self.runner, self.runner.device
        before_N, drawn_N = to_device(lengths.astype(np.int32) - 1, device), to_device(drawn.astype(np.int32), device)
        place = before_N, self.tables[places], runner.everyone, self.pool
        hidden_NE = runner.guess_hidden(self.tokens[places], hidden_NE, *place)
        self.guesses[places] = self._new_guesses(hidden_NE, self._of(places) | {"drawn": drawn_N}, self.rows[places])

    def _advance(self, rows: int, candidates: int | None = None, tail_draws: int | None = None):
        """Draws two tokens for every row, the second -1 where it does not count."""
        runner, tokens_B, guesses_B = self.runner, self.tokens[:rows], self.guesses[:rows]
        live_B = torch.arange(rows, device=runner.device) < self.active
        lengths_C, tables_C = _twice(torch.where(live_B, self.of["lengths"][:rows], 0)), _twice(self.tables[:rows])
        lengths_C[1::2] += live_B
        place = lengths_C, tables_C, 2 * self.active, self.pool
        hidden_CE = runner.decode_hidden(torch.stack((tokens_B, guesses_B), dim=1).flatten(), *place)
        of, drawn_C = {name: _twice(setting) for name, setting in self._of(slice(0, rows)).items()}, lengths_C.clone()
        of["drawn"][1::2] += 1
        known = [row for row in self.rows[:rows] for _ in range(2)]
        result = self._drawn(runner.logits(hidden_CE), drawn_C, of, known, candidates, tail_draws)

        right_B = (drawn_C[::2] == guesses_B) & live_B
        last_B = 2 * torch.arange(rows, device=runner.device) + right_B
        self.state[:2, :rows] += live_B + right_B.int()
        hidden_BE = runner.guess_hidden(drawn_C, hidden_CE, *place)[last_B]
        new_B = self._new_guesses(hidden_BE, self._of(slice(0, rows)), self.rows[:rows], candidates)
        tokens_B.copy_(torch.where(live_B, drawn_C[last_B], tokens_B))
        guesses_B.copy_(torch.where(live_B, new_B, guesses_B))
        counted_C = torch.stack((drawn_C[::2], torch.where(right_B, drawn_C[1::2], -1)), dim=1).flatten()
        if not self.is_cuda:
            return counted_C.numpy(), result[1]
        result[:, 0] = counted_C
        return result

    def _new_guesses(self, hidden_BE: Tensor, of: dict, rows: list[Row], candidates: int | None = None) -> Tensor:
        """Drawn as the next step will draw, without distributions."""
        guesses_B = torch.zeros_like(of["drawn"])
        if self.is_cuda:
            candidates = -abs(candidates or self._candidates(rows))
        bare = [replace(row, capture=None) for row in rows]
        self._drawn(self.runner.logits(hidden_BE), guesses_B, of, bare, candidates, tail_draws=0)
        return guesses_B


class SpeculativeRows(PagedRows):
    """The rows of the loop: each moves on by one token or two."""

    generator: SpeculativeGenerator
    steps: SpeculativeSteps

    def _shared_pages(self, prompt: Prompt) -> int:
        """The module's latents of a prompt's last token depend on the token drawn after it: each row has its own."""
        return (len(prompt.ids) - 1) // self.pool.page_tokens

    def _run(self, chunk: list[tuple[Prompt, int]], ids_T: Tensor, positions_T: Tensor, segments, slots_T: Tensor):
        hidden_TE = self.runner.finish(super()._run(chunk, ids_T, positions_T, segments, slots_T))
        # After a whole prompt comes what is drawn: `_joined` computes that place again, for each row.
        following = [(*prompt.ids, 0)[prompt.done + 1 : stop + 1] for prompt, stop in chunk]
        next_T = to_device(np.concatenate(following).astype(np.int32), self.runner.device)
        self.runner.prepare_guesses(next_T, hidden_TE, positions_T, segments, self.pool, slots_T)
        return hidden_TE

    def _hidden(self, prefilled: Tensor, rows_N: Tensor) -> Tensor:
        return prefilled[rows_N]

    def _joined(self, first: int, finished: list[tuple[Prompt, int]], prefilled: Tensor) -> None:
        at_N = to_device(np.array([at for prompt, at in finished for _ in prompt.rows]), self.runner.device)
        rows = self.rows[first:]
        lengths, drawn = (np.array([getattr(row, name) for row in rows]) for name in ("cached", "drawn"))
        self.steps.guess(prefilled[at_N], slice(first, len(self.rows)), lengths, drawn)

    def _step(self) -> None:
        self._reserve()
        if self.rows:
            self._upload()
            self.pending.append((self.rows.copy(), self.steps.step()))

    def _read(self) -> None:
        drawing, drawn = self.pending[0]
        if drawn.rows == len(drawing):  # first tokens
            return super()._read()
        self.pending.popleft()
        token_C, support = drawn.read()
        right_A = token_C[1::2] >= 0
        for running, right in zip(drawing, right_A.tolist()):
            if not running.closed:
                running.cached += 1 + right
                running.drawn += 1 + right
                self.generator.guessed += 1
                self.generator.right += right
        for which, offset in ((np.arange(len(drawing)), 0), (np.flatnonzero(right_A), 1)):
            if len(which):
                at = 2 * which + offset
                self._take_in([drawing[a] for a in which], token_C[at], rows_of(support, at, len(token_C)))


def _twice(of_B: Tensor) -> Tensor:
    """Every row for both of its tokens."""
    return of_B.repeat_interleave(2, dim=0)


def speculative_loop(
    model: nn.Module, config: dict, folder: Path, vocab_size: int, batch_size: int, stop_ids: Iterable[int],
    token_bytes: Callable[[], Sequence[bytes]] | None = None,
) -> SpeculativeGenerator:  # fmt: skip
    """The loop over pages of a whole model with its checkpoint's module. ModelError where one of them cannot run."""
    if reason := unsupported(model.config):
        raise ModelError(
            f"speculative decoding does not know this model: {reason}",
            where=str(folder),
            remedy="Set teacher.speculative to null.",
        )
    runner = MtpRunner(model, load(config, folder, model), vocab_size)
    return SpeculativeGenerator(runner, batch_size, stop_ids, token_bytes)
