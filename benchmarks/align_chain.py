"""A teacher whose probabilities are known exactly, and a fixed student: interpolated n-gram models over tokens.

    teacher (4-gram)    p(c | ab) = (n(abc) - D + D T(ab) p(c | b)) / n(ab)         absolute discounting, sharp
    student (trigram)   p(c | ab) = (n(abc) + T(ab) p(c | b)) / (n(ab) + T(ab))     Witten-Bell

T(ab): how many different tokens follow. Both go down to single tokens. The teacher is sampled and captured like a real
one; the student is only asked for probabilities of buckets of tokens, which it sums up in advance because its formula
is linear in the counts.
"""

from collections.abc import Iterator

import numpy as np

from distill.records import TokenDists

BASE_CANDIDATES = 512
ORDER, DISCOUNT = 4, 0.05


class TeacherChain:
    """Sampling and capture over the tokens of a corpus (lists of ids); `end` closes every trace."""

    def __init__(self, corpus: list[np.ndarray], end: int):
        self.end = end
        columns = zip(*(_windows(np.append(ids, end)) for ids in corpus))
        *context, token = (np.concatenate(column) for column in columns)
        self.unigram_ids, counts = np.unique(token, return_counts=True)
        self.unigram_p = counts / counts.sum()
        self._unigram_of = np.zeros(int(token.max()) + 1)
        self._unigram_of[self.unigram_ids] = self.unigram_p
        self._base = self.unigram_ids[np.argsort(-self.unigram_p)[:BASE_CANDIDATES]]
        self._after = [_followers(_key(*context[-length:]), token) for length in range(1, ORDER)]
        self._known: dict[tuple[int, ...], tuple] = {}

    def sample(self, rng: np.random.Generator, tokens: int, longest: int = 400) -> Iterator[np.ndarray]:
        """Traces until `tokens` are drawn."""
        while tokens > 0:
            ids = []
            while len(ids) < longest and (not ids or ids[-1] != self.end):
                ids.append(self._draw(rng, ([-1] * ORDER + ids)[1 - ORDER :]))
            tokens -= len(ids)
            yield np.array(ids, np.int64)

    def _draw(self, rng: np.random.Generator, context: list[int]) -> int:
        for table, key in reversed(self._tables(context)):
            if key in table:
                ids, counts, total = table[key]
                drawn = np.searchsorted(np.cumsum(counts - DISCOUNT), rng.random() * total, side="right")
                if drawn < len(ids):
                    return int(ids[drawn])
        return int(rng.choice(self.unigram_ids, p=self.unigram_p))

    def dists(self, ids: np.ndarray, k_max: int, tail_bound: float, draws: int = 0, seed: int = 0) -> TokenDists:
        """What a capture of this trace would hold: most likely tokens until the tail is below the bound, the sampled
        one always; with `draws`, so many draws from the tail (CaptureSpec.tail_draws)."""
        *context, token = (column.tolist() for column in _windows(ids))
        parts = [self._capture(before, last, k_max, tail_bound) for *before, last in zip(*context, token)]
        if draws:
            u = np.random.default_rng(seed).random(len(ids))
            parts = [self._drawn(before, *part, draws, at) for *before, part, at in zip(*context, parts, u)]
        zeros = np.zeros(len(ids), np.float32)
        return TokenDists(
            np.cumsum([0, *(len(part[0]) for part in parts)]),
            np.concatenate([part[0] for part in parts]).astype(np.int32),
            np.log(np.concatenate([part[1] for part in parts])).astype(np.float32),
            np.array([max(1 - part[1].sum(), 0) for part in parts], np.float32),
            zeros,
            ids.astype(np.int32),
        )

    def _capture(self, context: list[int], sampled: int, k_max: int, tail_bound: float):
        ids, p, below = self._distribution(context)
        size = min(int(np.searchsorted(below, 1 - tail_bound)) + 1, k_max, len(ids))
        if (ids[:size] == sampled).any():
            return ids[:size], p[:size]
        return np.append(ids[:size], sampled), np.append(p[:size], self._probability(context, np.array([sampled])))

    def _drawn(self, context: list[int], kept: np.ndarray, p: np.ndarray, draws: int, u: float):
        """(ids, masses): the kept ones and those drawn at equal distances in all the rest, which has no mass left."""
        tail = 1 - p.sum()
        if tail <= 1e-9:
            return kept, p
        near, likely, _ = self._distribution(context)
        outside = ~np.isin(near, kept)
        ids, below, points = near[outside], np.cumsum(likely[outside]), (u + np.arange(draws)) / draws * tail
        if points[-1] > (below[-1] if len(below) else 0):  # some lie behind the first 256
            far = self.unigram_ids[~np.isin(self.unigram_ids, np.append(near, kept))]
            ids, below = np.append(ids, far), np.cumsum(np.append(likely[outside], self._probability(context, far)))
        at = np.minimum(np.searchsorted(below, points), len(ids) - 1)
        drawn, times = np.unique(at, return_counts=True)
        ids, p = np.append(kept, ids[drawn]), np.append(p, times * tail / draws)
        order = np.argsort(-p, kind="stable")
        return ids[order], p[order]

    def _distribution(self, context: list[int]):
        """(ids, probabilities, their running sum), the most likely first; complete for the first 256."""
        if tuple(context) not in self._known:
            near = [table[key][0] for table, key in self._tables(context) if key in table]
            ids = np.unique(np.concatenate([self._base, *near]))
            p = self._probability(context, ids)
            order = np.argsort(-p)[:256]
            self._known[tuple(context)] = ids[order], p[order], np.cumsum(p[order])
        return self._known[tuple(context)]

    def _tables(self, context: list[int]) -> list[tuple[dict, int]]:
        return [(table, _key(*context[-length:])) for length, table in enumerate(self._after, 1)]

    def _probability(self, context: list[int], ids: np.ndarray) -> np.ndarray:
        p = self._unigram_of[ids]
        for table, key in self._tables(context):
            if key in table:
                others, counts, total = table[key]
                at = np.minimum(np.searchsorted(others, ids), len(others) - 1)
                p = (np.where(others[at] == ids, counts[at] - DISCOUNT, 0) + DISCOUNT * len(others) * p) / total
        return p


def _windows(ids: np.ndarray) -> list[np.ndarray]:
    """The ORDER - 1 tokens before each token, -1 for none, and the token."""
    padded = np.concatenate([np.full(ORDER - 1, -1), ids])
    return [padded[i : i + len(ids)] for i in range(ORDER)]


def _key(*context):
    """One integer (or array of them) for up to three ids below a million."""
    key = 0
    for token in context:
        key = key << 20 | (token + 1)
    return key


def _followers(context: np.ndarray, token: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """context -> (tokens that follow, ascending; how often each; how often any)."""
    pairs, counts = np.unique(np.stack([context, token]), axis=1, return_counts=True)
    starts = np.flatnonzero(np.concatenate([[True], pairs[0, 1:] != pairs[0, :-1]]))
    ends = np.append(starts[1:], pairs.shape[1])
    return {int(pairs[0, s]): (pairs[1, s:e], counts[s:e], int(counts[s:e].sum())) for s, e in zip(starts, ends)}


class StudentChain:
    """p(the next token's class | the two tokens before), for classes of tokens given by class_S (one id a class)."""

    def __init__(self, corpus: list[np.ndarray], class_S: np.ndarray):
        rows = [np.concatenate([[-1, -1], ids]) + 1 for ids in corpus]
        third = class_S[np.concatenate([row[2:] for row in rows]) - 1].astype(np.int64)
        exact = np.concatenate([row[2:] for row in rows])
        second, first = np.concatenate([row[1:-1] for row in rows]), np.concatenate([row[:-2] for row in rows])
        self._width = len(class_S) + 1
        self._floor = np.bincount(class_S, minlength=len(class_S)) / len(class_S)
        self._orders = [
            _Order(context, third, exact, self._width) for context in (first * 0, second, first * self._width + second)
        ]

    def probability(self, before_two: np.ndarray, before: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """p of each class behind each context (ids, -1 for none)."""
        a, b = before_two + 1, before + 1
        p = self._floor[classes]
        for order, context in zip(self._orders, (a * 0, b, a * self._width + b)):
            p = order.interpolate(p, context, classes)
        return p


class _Order:
    def __init__(self, context: np.ndarray, token: np.ndarray, exact: np.ndarray, width: int):
        self._width = width
        self._contexts, index, self._totals = np.unique(context, return_inverse=True, return_counts=True)
        self._keys, self._counts = np.unique(index * width + token, return_counts=True)
        self._types = np.bincount(np.unique(index * width + exact) // width, minlength=len(self._contexts))

    def interpolate(self, lower: np.ndarray, context: np.ndarray, token: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self._contexts, context), len(self._contexts) - 1)
        key = at * self._width + token
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        count = np.where(self._keys[place] == key, self._counts[place], 0)
        total, types = self._totals[at], self._types[at]
        return np.where(self._contexts[at] == context, (count + types * lower) / (total + types), lower)
