"""From a teacher's tokens to a student's with another tokenizer: one object for a pair of them.

Text is bytes, and both tokenizations cut the same bytes. The teacher's ids are taken as sampled, the student's are its
own encoding of their bytes, and a cached distribution over teacher tokens becomes one over buckets of student tokens.

    align_bytes    a tokenizer, byte for byte          align_spans    which token begins in which
    align_markers  tokens that are no text             align_pairs    which student tokens can be neighbours
    align_tables   pieces, roots, buckets of a pair    align_keep     how often a text agrees with a piece
    align_targets  distributions over buckets          align_read     the same on text that was not sampled
    align_report   what share of the signal survives
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill import align_read, align_spans, align_targets
from distill.align_bytes import ByteTokenizer, gather_runs
from distill.align_keep import KeepCounts, count_keep
from distill.align_pairs import PairMask
from distill.align_report import coverage
from distill.align_spans import ALIGNED, UNCOVERED, Alignment
from distill.align_tables import load_tables
from distill.align_targets import BucketTargets
from distill.records import CaptureSpec, TokenDists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextCounts:
    """Counted on texts: how often they agree with each teacher token, and which student tokens they can show."""

    keep: KeepCounts
    used_S: np.ndarray

    def __add__(self, other: TextCounts) -> TextCounts:
        return TextCounts(self.keep + other.keep, self.used_S | other.used_S)


class Aligner:
    """Alignment and targets for one teacher and one student tokenizer.

    tables: PairTables. keep_P: set by `learn`; until then every piece counts as always kept. cache_dir: where the
    tables are kept between runs, None for nowhere.
    """

    def __init__(
        self, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, cache_dir: Path | None = None
    ):
        self.teacher, self.student = ByteTokenizer(teacher), ByteTokenizer(student)
        self.tables = load_tables(self.teacher, self.student, cache_dir)
        self.pairs = PairMask(self.student)
        self.keep_P: np.ndarray | None = None

    def align(self, completions: list[list[int]] | list[np.ndarray]) -> Alignment:
        """The student's tokens of these completions (teacher ids, with the stop id where there is one), and what is
        known about each. Errors: DataError as align_spans.align."""
        traces = [np.asarray(ids, np.int64) for ids in completions]
        return align_spans.align(self.teacher, self.student, self.tables, traces)

    def count(self, alignment: Alignment) -> TextCounts:
        """What `learn` needs of these texts; counts of several add up."""
        return TextCounts(count_keep(self.tables, alignment), self._used(alignment))

    def learn(self, counts: TextCounts) -> None:
        """From now on candidates are weighed by how often the counted texts agree with them, and buckets hold only the
        student tokens that those texts can show."""
        self.keep_P = counts.keep.shares()
        self.tables = self.tables.with_buckets_of(counts.used_S)

    def _used(self, alignment: Alignment) -> np.ndarray:
        """bool [S]: student tokens of these texts, and the pieces of their teacher tokens."""
        used_S = np.zeros(len(self.student), bool)
        used_S[alignment.ids_N] = True
        ids = np.unique(alignment.teacher_ids_T)
        used_S[gather_runs(self.tables.pieces_P, self.tables.offsets_T1[ids], self.tables.piece_counts_T[ids])] = True
        return used_S

    def targets(self, alignment: Alignment, dists: list[TokenDists], capture: CaptureSpec) -> BucketTargets:
        """The targets of all student positions, from one set of distributions a trace, cut to `capture`.

        Errors: DataError when they are of another text.
        """
        return align_targets.make_targets(
            self.tables, alignment, dists, capture=capture, keep_P=self.keep_P, pairs=self.pairs
        )

    def read_targets(
        self, alignment: Alignment, dists: list[TokenDists]
    ) -> tuple[BucketTargets, np.ndarray, np.ndarray]:
        """The targets of text that the teacher did not sample, with its chunks; see align_read.read_targets."""
        return align_read.read_targets(self.tables, alignment, dists, keep_P=self.keep_P, pairs=self.pairs)

    def coverage(self, alignment: Alignment, kind_N: np.ndarray | None = None) -> np.ndarray:
        """Positions by kind and class of text, see align_report. kind_N: the targets' where they are made; else what
        they will be, as the text alone tells."""
        return coverage(self.teacher, alignment, self._foreseen(alignment) if kind_N is None else kind_N)

    def _foreseen(self, alignment: Alignment) -> np.ndarray:
        """kind_N of the targets: an aligned position will be uncovered where the pair mask rules out the teacher's own
        token. (Another of its bucket may stay, which hardly ever happens.)"""
        kind_N = alignment.kind_N.copy()
        asked = np.flatnonzero((kind_N == ALIGNED) & (alignment.before_N >= 0))
        token = alignment.teacher_ids_T[alignment.teacher_N[asked]]
        if not self.tables.identical:
            text = ~self.tables.marker_T[token]
            asked, first = asked[text], self.tables.pieces_P[self.tables.offsets_T1[token[text]]]
            kind_N[asked[~self.pairs.valid(alignment.before_N[asked], first)]] = UNCOVERED
        return kind_N
