"""Samples and scores of one model over pages: what distill.generate.Generator does over slots.

The page pool and the recorded decode steps live as long as the generator: a second call starts at once. Drawing rows,
stop texts and the order of results are those of distill.generate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from distill.errors import ModelError
from distill.generate import Generator, Row
from distill.records import CaptureSpec, TokenDists
from teachers.paged import PAGE_TOKENS, PagePool, pages_that_fit
from teachers.runner import Runner
from teachers.scheduler import PagedRows
from teachers.scoring import Scorer
from teachers.steps import Steps

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
        self.scorer = Scorer(runner, page_tokens)
        self.preempted = 0  # rows that gave way, in all loops together
        self._is_open = False

    @contextmanager
    def rows(self) -> Iterator[PagedRows]:
        """The loop itself, with no row in it, for whoever feeds it between steps. One at a time."""
        if self._is_open:
            raise RuntimeError("another sample() of this model is still open: exhaust it or close it first")
        if self.pool is None:
            self.pool = self._new_pool()
            self.steps = self._new_steps()
        self._is_open = True
        loop = self._new_loop()
        try:
            yield loop
            self.finish()  # not after an error or an abandoned sample(): the others end by the lost connection
        finally:
            self._is_open = False
            self.preempted += loop.preempted
            loop.close()

    @property
    def counts(self) -> dict[str, int]:
        """What was saved and what was done twice so far, by name (teachers.service_metrics.COUNTS)."""
        return {"shared_tokens": self.scorer.shared_tokens, "preempted": self.preempted}

    def finish(self) -> None:
        """Takes part in the passes of ranks that share experts and have work, until none has. Called by all of them."""
        mesh = self.runner.mesh
        if mesh is None or mesh.shares == 1:
            return
        while now := mesh.meet():
            self.runner.idle() if now.is_prefill else self.steps.idle(now)

    def let_go(self) -> list[dist.ProcessGroup]:
        """Drops pages and recorded steps; the groups that its ranks talked over, for whoever gives them back."""
        self.release()
        mesh = self.runner.mesh
        return mesh.groups if mesh else []

    def release(self) -> None:
        """Gives back the memory of pages and recorded steps, while no sample() is open; the next one takes it again."""
        self.pool = self.steps = None

    def check(self, row: Row, where: str) -> None:
        """Raises DataError or ModelError if the row cannot run."""
        super().check(row, where)
        self._check_width(max(row.params.top_k, row.capture.k_max if row.capture else 0))

    def _check_width(self, wanted: int) -> None:
        if self.runner.device.type == "cuda" and LARGEST_K < wanted < self.runner.vocab_size:
            raise ModelError(
                f"on a GPU, top_k and capture.k_max are at most {LARGEST_K}", value=wanted, remedy="Lower it."
            )

    @property
    def _cached_layers(self) -> int:
        return len(self.runner.layers)

    def _new_steps(self) -> Steps:
        return Steps(self.runner, self.pool, self.slots)

    def _new_loop(self) -> PagedRows:
        if self.runner.device.type != "cuda":
            return PagedRows(self, self.pool, self.steps, lag=0)
        mesh = self.runner.mesh  # other ranks wait for a host that is late: it gets a step more in hand
        return PagedRows(self, self.pool, self.steps, lag=2 if mesh and mesh.shares > 1 else 1)

    def _new_pool(self) -> PagePool:
        runner = self.runner
        layers, size, element = self._cached_layers, runner.entry_size, runner.embed.element_size()
        most = self.slots * -(-runner.max_positions // self.page_tokens)
        if self.cache_tokens is not None:
            pages = -(-self.cache_tokens // self.page_tokens)
        elif runner.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(runner.device)[0] - RESERVE_BYTES
            pages = pages_that_fit(free, layers, size, element, self.page_tokens) - 1
        else:
            pages = most
        if runner.mesh:  # ranks that run the same rows must run out of pages together
            pages = runner.mesh.least(pages)
        return PagePool(
            layers, min(pages, most) + 1, size, dtype=runner.dtype, device=runner.device, page_tokens=self.page_tokens
        )

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], capture: CaptureSpec) -> list[TokenDists]:
        """The distributions of every completion token of (prompt_ids, completion_ids) pairs, in the order given."""
        self._check_width(capture.k_max)
        scored = self.scorer.score(sequences, capture)
        if not self._is_open:
            self.finish()
        return scored
