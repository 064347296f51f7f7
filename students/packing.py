"""Which traces share a row and which rows share an optimizer step: a pure function of lengths, keys, seed and epoch.

Nothing here knows how many ranks there are, so the same steps are trained on any number of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from distill.errors import DataError


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`: each item, longest first, goes to the first row it fits.

    Items of equal length keep their order. At most 11/9 of the optimal number of rows + 2/3 (Dosa 2007). A tree over
    the rows' free room finds the row in O(log n). DataError if an item is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > capacity:
        raise DataError(f"an item of {lengths[order[0]]} tokens does not fit a row of {capacity}", where="packing")
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # room[n] = most free tokens of any row under node n; the leaves are the rows
    rows: list[list[int]] = []
    for item in order:
        need, node = lengths[item], 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= need else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(item)
        room[node] -= need
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its rows of trace indices, and what they hold over all micro-batches and ranks."""

    epoch: int
    rows: list[list[int]]
    tokens: int
    trained_tokens: int

    def micro_batches(self, rank: int, world: int, rows_per_micro_batch: int) -> list[list[list[int]]]:
        """This rank's rows, in as many micro-batches as every other rank has; one may be empty.

        Every rank must run the same number of forwards, because under ZeRO each of them communicates.
        """
        per_rank = -(-len(self.rows) // world)
        count = -(-per_rank // rows_per_micro_batch)
        mine = self.rows[rank::world]
        return [mine[i::count] for i in range(count)]


class TrainPlan:
    """The steps of a whole training, computed an epoch at a time; `len(plan)` steps, `plan[i]` is step i."""

    def __init__(
        self,
        keys: Sequence[str],
        lengths: Sequence[int],
        trained: Sequence[int],
        *,
        row_tokens: int,
        batch_tokens: int,
        epochs: int,
        seed: int,
    ):
        """lengths: input tokens of each trace; trained: those that bear loss. batch_tokens >= row_tokens."""
        self.keys, self.lengths, self.trained = keys, lengths, trained
        self.row_tokens, self.rows_per_step = row_tokens, batch_tokens // row_tokens
        self.epochs, self.seed = epochs, seed
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)
        # First-fit-decreasing sees lengths alone, so every epoch has the same number of rows.
        self.rows_per_epoch = len(first_fit_decreasing(lengths, row_tokens))
        self.steps_per_epoch = -(-self.rows_per_epoch // self.rows_per_step)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> StepPlan:
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, number = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[number :: self.steps_per_epoch]  # an even split: no step is a small rest
        members = [i for row in rows for i in row]
        tokens, trained = sum(self.lengths[i] for i in members), sum(self.trained[i] for i in members)
        return StepPlan(epoch, rows, tokens, trained)

    @property
    def efficiency(self) -> float:
        """The share of the rows' room that is filled, 0 to 1."""
        return sum(self.lengths) / (self.rows_per_epoch * self.row_tokens)

    @property
    def digest(self) -> str:
        """16 hex digits over everything that the order of the data depends on."""
        state = (list(zip(self.keys, self.lengths, self.trained)), self.row_tokens, self.rows_per_step, self.seed)
        return hashlib.sha256(repr((state, self.epochs)).encode()).hexdigest()[:16]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        """Which traces of equal length sit where, and the order of the rows, change from epoch to epoch."""

        def rank(i: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{epoch}/{self.keys[i]}".encode()).digest()

        order = sorted(range(len(self.keys)), key=rank)
        rows = first_fit_decreasing([self.lengths[i] for i in order], self.row_tokens)
        shuffled = sorted(([order[i] for i in row] for row in rows), key=lambda row: rank(row[0]))
        return [sorted(row, key=rank) for row in shuffled]
