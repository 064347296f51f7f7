"""Pages of cached tokens (MLA latents, or keys and values), handed out a page at a time, full pages of a prompt shared.

The pool is one tensor [layers, pages, page tokens, numbers of a token]. A row owns a list of pages; pages that several
rows hold (the full pages of one prompt's samples) are counted and freed with their last holder. Page 0 belongs to
nobody: rows that only fill up a batch write there.
"""

import numpy as np
import torch
from torch import Tensor

from distill.errors import CapacityError
from teachers.transfer import to_device

PAGE_TOKENS = 64


class PagePool:
    """`states` [layers, pages, page_tokens, size] and who holds which page. States start at zero, never NaN."""

    def __init__(
        self, layers: int, pages: int, size: int, *, dtype: torch.dtype, device: torch.device, page_tokens=PAGE_TOKENS
    ):
        if pages < 2:
            raise CapacityError(
                "no memory is left for cached tokens",
                where="the teacher's page pool",
                value=f"{max(pages, 0)} pages of {page_tokens} tokens",
                remedy="Use a smaller model, a larger GPU, or more of them.",
            )
        self.page_tokens = page_tokens
        self.states = torch.zeros(layers, pages, page_tokens, size, dtype=dtype, device=device)
        self.holders = np.zeros(pages, dtype=np.int64)
        self._free = list(range(pages - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that rows can hold."""
        return len(self.holders) - 1

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        return self.states.shape[0] * self.states.shape[3] * self.states.element_size()

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """`count` pages for a new holder. CapacityError when fewer are free: ask `free` first."""
        if count > self.free:
            raise CapacityError("the page pool is empty", value=f"{self.free} of {count} pages")
        pages = [self._free.pop() for _ in range(count)]
        self.holders[pages] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """The same pages for one more holder."""
        if (self.holders[pages] < 1).any():
            raise ValueError("a page that nobody holds cannot be shared")
        self.holders[pages] += 1
        return list(pages)

    def give_back(self, pages: list[int]) -> None:
        """One holder less; a page without any is free."""
        if (self.holders[pages] < 1).any() or len(set(pages)) < len(pages):
            raise ValueError("a page was given back twice")
        self.holders[pages] -= 1
        self._free += [page for page in pages if self.holders[page] == 0]

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages, all layers."""
        from_M, to_M = to_device(np.array([sources, targets]), self.states.device)
        self.states[:, to_M] = self.states[:, from_M]

    def slots(self, pages: list[int], start: int, stop: int) -> np.ndarray:
        """Where tokens start..stop-1 of a row with these pages lie: page * page_tokens + place, int64."""
        page_N, place_N = np.divmod(np.arange(start, stop), self.page_tokens)
        return np.asarray(pages, dtype=np.int64)[page_N] * self.page_tokens + place_N

    def layer(self, index: int) -> Tensor:
        return self.states[index]


def pages_that_fit(free_bytes: int, layers: int, size: int, element_bytes: int, page_tokens: int = PAGE_TOKENS) -> int:
    """How many pages of all layers go into free_bytes."""
    return free_bytes // (layers * page_tokens * size * element_bytes)
