"""Samples and scores of one model over paged latents: what distill.generate.Generator does over slots.

The page pool and the recorded decode steps live as long as the generator: a second call starts at once. Drawing rows,
stop texts and the order of results are those of distill.generate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from distill.errors import ModelError
from distill.generate import Generator, Row, check_ids
from distill.records import CaptureSpec, TokenDists
from distill.sampling import StepLogits, capture_support
from distill.step_log import Tokens
from teachers.paged import PAGE_TOKENS, PagePool, pages_that_fit
from teachers.runner import Runner, Segment
from teachers.scheduler import PagedRows
from teachers.steps import Steps, unpack
from teachers.transfer import to_device, to_host

SCORE_TOKENS = 16384  # of one forward pass
SCORE_LOGITS = 1 << 28  # logits held at once while scoring on a GPU: 1 GiB
SCORE_LOGITS_CPU = 1 << 23
RESERVE_BYTES = 6 << 30  # of a GPU, for activations, logits and the memory of recorded steps
LARGEST_K = 256  # candidates that a step on a GPU looks at


class PagedGenerator(Generator):
    """Draws and scores completions. `cache_tokens`: of all rows together; without it, what the GPU has left."""

    def __init__(
        self, runner: Runner, batch_size: int, stop_ids: Iterable[int],
        token_bytes: Callable[[], Sequence[bytes]] | None = None, *, cache_tokens: int | None = None,
        page_tokens: int = PAGE_TOKENS,
    ):  # fmt: skip
        super().__init__(runner, batch_size, stop_ids, token_bytes)
        self.runner, self.cache_tokens, self.page_tokens = runner, cache_tokens, page_tokens
        self.pool: PagePool | None = None
        self.steps: Steps | None = None
        self.preempted = 0  # rows that gave way, in all loops together
        self._is_open = False

    @contextmanager
    def rows(self) -> Iterator[PagedRows]:
        """The loop itself, with no row in it, for whoever feeds it between steps. One at a time."""
        if self._is_open:
            raise RuntimeError("another sample() of this model is still open: exhaust it or close it first")
        if self.pool is None:
            self.pool = self._new_pool()
            self.steps = Steps(self.runner, self.pool, self.slots)
        self._is_open = True
        loop = PagedRows(self, self.pool, self.steps, lag=1 if self.runner.device.type == "cuda" else 0)
        try:
            yield loop
        finally:
            self._is_open = False
            self.preempted += loop.preempted
            loop.close()

    def check(self, row: Row, where: str) -> None:
        """Raises DataError or ModelError if the row cannot run."""
        super().check(row, where)
        self._check_width(max(row.params.top_k, row.capture.k_max if row.capture else 0))

    def _check_width(self, wanted: int) -> None:
        if self.runner.device.type == "cuda" and LARGEST_K < wanted < self.runner.vocab_size:
            raise ModelError(
                f"on a GPU, top_k and capture.k_max are at most {LARGEST_K}", value=wanted, remedy="Lower it."
            )

    def _new_pool(self) -> PagePool:
        runner = self.runner
        layers, size, element = len(runner.layers), runner.latent_size, runner.embed.element_size()
        most = self.slots * -(-runner.max_positions // self.page_tokens)
        if self.cache_tokens is not None:
            pages = -(-self.cache_tokens // self.page_tokens)
        elif runner.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(runner.device)[0] - RESERVE_BYTES
            pages = pages_that_fit(free, layers, size, element, self.page_tokens) - 1
        else:
            pages = most
        return PagePool(
            layers, min(pages, most) + 1, size, dtype=runner.dtype, device=runner.device, page_tokens=self.page_tokens
        )

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of every completion token of (prompt_ids, completion_ids) pairs, in the order given."""
        self._check_width(capture.k_max)
        scored: list[TokenDists | None] = [None] * len(sequences)
        late = None  # the batch whose result is on its way while the next one is computed
        for batch in _batches(sequences):
            now = batch, self._score_batch([sequences[i] for i in batch], capture)
            if late:
                self._take(*late, sequences, scored)
            late = now
        if late:
            self._take(*late, sequences, scored)
        return scored

    def _take(self, batch: list[int], parts: list, sequences, scored: list) -> None:
        bounds = np.cumsum([0, *(len(sequences[i][1]) for i in batch)])
        tokens = Tokens.concatenate([read() for read in parts])
        for i, stretch in zip(batch, tokens.split(bounds)):
            scored[i] = stretch.dists()

    def _score_batch(self, pairs: list[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list:
        ids, positions, segments, where, device = [], [], [], [], self.runner.device
        for prompt, completion in pairs:
            check_ids((*prompt, *completion), len(prompt), 0, self.runner, "a sequence to score")
            start, count = len(ids), len(prompt) + len(completion)
            segments.append(Segment(start, count))
            ids += (*prompt, *completion)
            positions += range(count)
            where += range(start + len(prompt) - 1, start + count - 1)
        ids_T = to_device(np.array(ids, dtype=np.int32), device)
        positions_T = to_device(np.array(positions, dtype=np.int32), device)
        parts = self.runner.prefill(ids_T, positions_T, segments, None, None)
        where_N = to_device(np.array(where, dtype=np.int64), device)
        hidden_NE, sampled_N = self.runner.finish(parts, where_N), ids_T[where_N + 1] if where else where_N.int()
        limit = SCORE_LOGITS if device.type == "cuda" else SCORE_LOGITS_CPU
        chunk = max(1, limit // self.runner.vocab_size)
        return [self._score_chunk(*part, capture) for part in zip(hidden_NE.split(chunk), sampled_N.split(chunk))]

    @torch.inference_mode()
    def _score_chunk(self, hidden_NE: torch.Tensor, sampled_N: torch.Tensor, capture: CaptureSpec):
        """A function that gives the chunk's Tokens, waiting for them on a GPU."""
        logits_NV = self.runner.logits(hidden_NE)
        rows = len(logits_NV)
        if self.runner.device.type != "cuda":
            tokens = Tokens.of(sampled_N.numpy(), capture_support(StepLogits(logits_NV), sampled_N.long(), capture))
            return lambda: tokens
        from teachers.kernels import draw

        wanted = lambda value, dtype: torch.full((rows,), value, dtype=dtype, device=logits_NV.device)  # noqa: E731
        how = draw.HowCaptured(wanted(capture.k_max, torch.int32), wanted(capture.tail_bound, torch.float32))
        k = draw.width(capture.k_max, self.runner.vocab_size)
        read = to_host(draw.step(logits_NV, sampled_N, None, how, k))
        return lambda: Tokens.of(*unpack(read()))


def _batches(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
    """Indices of sequences, shortest first, in batches of at most SCORE_TOKENS tokens, or one that is longer."""
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    batch, tokens = [], 0
    for i in sorted(range(len(sequences)), key=lengths.__getitem__):
        if batch and tokens + lengths[i] > SCORE_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch
