"""What the rows of a generate loop may differ in: how they are drawn and captured, and the texts that end them.

Shape legend: A active rows, S slots.
"""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Settings(Generic[T]):
    """One setting of every slot, so that rows of equal settings are found together; of_S are numbers of settings."""

    def __init__(self, slots: int):
        self.of_S = np.zeros(slots, dtype=np.int64)
        self._known: dict[Hashable, tuple[int, T]] = {}

    def set(self, slot: int, key: Hashable, value: T) -> None:
        """`key` is equal for values that may be treated together."""
        if key not in self._known:
            self._forget_unused()
            number = max((number for number, _ in self._known.values()), default=-1) + 1
            self._known[key] = (number, value)
        self.of_S[slot] = self._known[key][0]

    def groups(self, rows: slice) -> list[tuple[T, np.ndarray | None]]:
        """(value, positions within `rows`) of each setting among these rows; positions None for all of them."""
        if len(self._known) == 1:
            ((_, value),) = self._known.values()
            return [(value, None)]
        of_A = self.of_S[rows]
        values = {number: value for number, value in self._known.values()}
        numbers = np.unique(of_A).tolist()
        if len(numbers) == 1:
            return [(values[numbers[0]], None)]
        return [(values[number], np.flatnonzero(of_A == number)) for number in numbers]

    def _forget_unused(self) -> None:
        """Keeps the table as short as the slots; settings of slots that are free now may stay a while."""
        if len(self._known) > len(self.of_S):
            used = set(self.of_S.tolist())
            self._known = {key: (number, value) for key, (number, value) in self._known.items() if number in used}


class StopTexts:
    """Watches one row for texts that end it. The search is over bytes: a text may begin inside a token."""

    def __init__(self, texts: Sequence[str], token_bytes: Sequence[bytes]):
        self._texts = [(text, text.encode()) for text in texts]
        self._token_bytes = token_bytes
        self._keep_bytes = max(len(coded) for _, coded in self._texts) - 1
        self._tail = b""

    def add(self, token: int) -> str | None:
        """The stop text that this token completes, the first of them to begin; None if it completes none."""
        seen = self._tail + self._token_bytes[token]
        found = [(at, text) for text, coded in self._texts if (at := seen.find(coded)) >= 0]
        self._tail = seen[-self._keep_bytes :] if self._keep_bytes else b""
        return min(found)[1] if found else None
