"""How often the student's cut of a text agrees with a teacher token's pieces: keep, counted on texts.

A candidate counts as "its piece comes next", which the text behind it can undo: after the teacher's "a" may come "b",
and the student's text then shows "ab". keep of a piece is the share of its teacher token's occurrences, among those
whose earlier pieces stand in the text, where the student's token is in the bucket of this one.

Shape legend: P pieces of all teacher ids one behind the other, N positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.align_spans import ALIGNED, CONTRADICTED, INNER, Alignment
from distill.align_tables import PairTables

# Occurrences that the share of all tokens together counts for, against a token's own.
PRIOR_COUNT = 4.0


@dataclass(frozen=True)
class KeepCounts:
    """seen_P, agreed_P: int64, occurrences of each piece of each teacher id and those the text agreed with. Add up."""

    seen_P: np.ndarray
    agreed_P: np.ndarray

    def __add__(self, other: KeepCounts) -> KeepCounts:
        return KeepCounts(self.seen_P + other.seen_P, self.agreed_P + other.agreed_P)

    def shares(self) -> np.ndarray:
        """keep_P: float64 in (0, 1]; exactly 1 everywhere where nothing ever disagreed."""
        seen, agreed = int(self.seen_P.sum()), int(self.agreed_P.sum())
        if seen == agreed:
            return np.ones(len(self.seen_P))
        prior = (agreed + 1) / (seen + 1)
        return (self.agreed_P + PRIOR_COUNT * prior) / (self.seen_P + PRIOR_COUNT)


def count_keep(tables: PairTables, alignment: Alignment) -> KeepCounts:
    """The counts of one alignment."""
    token_N = alignment.teacher_ids_T[alignment.teacher_N]
    reached_N = np.isin(alignment.kind_N, (ALIGNED, INNER, CONTRADICTED))
    at = (tables.offsets_T1[token_N] + alignment.depth_N)[reached_N]
    agreed, size = (alignment.kind_N != CONTRADICTED)[reached_N], len(tables.pieces_P)
    return KeepCounts(np.bincount(at, minlength=size), np.bincount(at[agreed], minlength=size))
