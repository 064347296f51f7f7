"""Which traces share a row and which rows share an optimizer step: a pure function of lengths, keys, seed and epoch.

Nothing here knows how many ranks there are, so the same steps are trained on any number of them.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

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


@dataclass(frozen=True)
class Passes:
    """How often an epoch goes over each of several sets of examples that lie one behind the other.

    A set is a stream of passes, each over all of its examples in an order of its own. An epoch takes the next `weight`
    passes' worth of the stream: no example comes again before all the others of its set have.
    """

    sizes: Sequence[int]
    weights: Sequence[float]

    @property
    def whole(self) -> bool:
        """Whether every epoch takes every example equally often."""
        return all(weight == int(weight) for weight in self.weights)

    def members(self, epoch: int, rank: Callable[[int, int], bytes]) -> list[tuple[int, int]]:
        """(example, which of its appearances in the epoch) of an epoch. rank(example, pass) orders a pass."""
        taken, first = [], 0
        for size, weight in zip(self.sizes, self.weights):
            begin, end = (round(size * weight * e) for e in (epoch, epoch + 1))
            for number in range(begin // size, -(-end // size)):
                part = range(first, first + size)
                low, high = max(begin - number * size, 0), min(end - number * size, size)
                if (low, high) != (0, size):
                    part = sorted(part, key=lambda i: rank(i, number))[low:high]
                taken += [(i, number - begin // size) for i in part]
            first += size
        return taken


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
        passes: Passes | None = None,
        curriculum: str = "none",
    ):
        """lengths: input tokens of each trace; trained: those that bear loss. batch_tokens >= row_tokens. passes: over
        each set of a mixture, None for one pass over everything. curriculum "length": the steps of the first epoch go
        from rows of short traces to rows of long ones."""
        self.keys, self.lengths, self.trained = keys, lengths, trained
        self.row_tokens, self.rows_per_step = row_tokens, batch_tokens // row_tokens
        self.epochs, self.seed, self.curriculum = epochs, seed, curriculum
        self.passes = passes or Passes([len(keys)], [1.0])
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)
        # First-fit-decreasing sees lengths alone: with whole passes every epoch has the same number of rows.
        counted = [self._count_rows(epoch) for epoch in range(1 if self.passes.whole else epochs)]
        self.rows_of_epoch = counted * (epochs // len(counted))
        self.first_step = [0, *accumulate(-(-rows // self.rows_per_step) for rows in self.rows_of_epoch)]

    def __len__(self) -> int:
        return self.first_step[-1]

    def __getitem__(self, step: int) -> StepPlan:
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch = bisect_right(self.first_step, step) - 1
        number, steps = step - self.first_step[epoch], self.first_step[epoch + 1] - self.first_step[epoch]
        every = self._epoch(epoch)
        if self._by_length(epoch):
            rows = every[number * len(every) // steps : (number + 1) * len(every) // steps]
        else:
            rows = every[number::steps]  # an even split: no step is a small rest
        members = [i for row in rows for i in row]
        tokens, trained = sum(self.lengths[i] for i in members), sum(self.trained[i] for i in members)
        return StepPlan(epoch, rows, tokens, trained)

    def epochs_done(self, steps: int) -> float:
        """Passes over the data after so many steps, with the share of the epoch they are in."""
        epoch = min(bisect_right(self.first_step, steps) - 1, self.epochs - 1)
        return epoch + (steps - self.first_step[epoch]) / (self.first_step[epoch + 1] - self.first_step[epoch])

    @cached_property
    def tokens(self) -> int:
        """Input tokens of all epochs."""
        counts = self.passes.whole and Counter(i for i, _ in self._members(0))
        if counts:
            return self.epochs * sum(self.lengths[i] * count for i, count in counts.items())
        return sum(self.lengths[i] for epoch in range(self.epochs) for i, _ in self._members(epoch))

    @property
    def efficiency(self) -> float:
        """The share of the rows' room that is filled, 0 to 1."""
        return self.tokens / (sum(self.rows_of_epoch) * self.row_tokens)

    @property
    def digest(self) -> str:
        """16 hex digits over everything that the order of the data depends on."""
        state = (list(zip(self.keys, self.lengths, self.trained)), self.row_tokens, self.rows_per_step, self.seed)
        mixed = (list(self.passes.sizes), list(self.passes.weights), self.curriculum)
        return hashlib.sha256(repr((state, self.epochs, mixed)).encode()).hexdigest()[:16]

    def _by_length(self, epoch: int) -> bool:
        return self.curriculum == "length" and epoch == 0

    def _members(self, epoch: int) -> list[tuple[int, int]]:
        return self.passes.members(epoch, lambda i, number: self._hash(f"pass {number}", i))

    def _count_rows(self, epoch: int) -> int:
        return len(first_fit_decreasing([self.lengths[i] for i, _ in self._members(epoch)], self.row_tokens))

    def _hash(self, purpose: str, i: int) -> bytes:
        return hashlib.sha256(f"{self.seed}/{purpose}/{self.keys[i]}".encode()).digest()

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        """Which traces of equal length sit where, and the order of the rows, change from epoch to epoch."""
        rank = {
            (i, again): self._hash(f"{epoch}/again {again}" if again else f"{epoch}", i)
            for i, again in self._members(epoch)
        }
        order = sorted(rank, key=rank.__getitem__)
        packed = first_fit_decreasing([self.lengths[i] for i, _ in order], self.row_tokens)
        rows = [[order[j] for j in row] for row in packed]
        if self._by_length(epoch):
            rows.sort(key=lambda row: (self.lengths[row[0][0]], rank[row[0]]))  # the longest of a row comes first
        else:
            rows.sort(key=lambda row: rank[row[0]])
        return [[i for i, _ in sorted(row, key=rank.__getitem__)] for row in rows]
