"""A student whose tokenizer is not the teacher's: its tokens of the traces, and targets from the teacher's cache.

The student's completion is its own encoding of the bytes of the teacher's ids as they were sampled. Distributions are
turned into targets when a micro-batch is made: faster than a student trains, and nothing has to be stored.
"""

from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from distill.align import Aligner, TextCounts
from distill.align_report import coverage_rows, coverage_text
from distill.align_spans import KINDS, Alignment
from distill.align_tables import default_cache_dir
from distill.align_targets import BucketTargets, pad
from distill.errors import DataError
from distill.losses.buckets import BucketedTargets
from distill.records import CaptureSpec, TokenDists
from distill.tokens import fingerprint, load_tokenizer


@dataclass(frozen=True)
class Learned:
    """What texts teach: counts, and coverage as in AlignedSignal. Of several texts they add up."""

    counts: TextCounts
    coverage: np.ndarray


class AlignedSignal:
    """Reads traces first (`completions`, or `cut` and `add`), learns from all of them (`finish`), then makes targets.

    coverage: int64 [kinds, classes], positions by kind and by kind of text (align_report).
    """

    def __init__(self, teacher_path: str, tokenizer: PreTrainedTokenizerFast, sampled_with: str):
        """sampled_with: fingerprint of the tokenizer that the traces are of; DataError if teacher_path has another."""
        teacher = load_tokenizer(teacher_path)
        if fingerprint(teacher) != sampled_with:
            raise DataError(
                f"the traces were sampled with tokenizer {sampled_with}, not with the teacher's",
                where=f"teacher.path {teacher_path}",
                value=fingerprint(teacher),
                remedy="Point teacher.path to the model that sampled the traces, or sample again: --restart traces.",
            )
        self.aligner = Aligner(teacher, tokenizer, default_cache_dir())
        self.coverage: np.ndarray | None = None
        self._counts: TextCounts | None = None
        self._one_at_a_time = Lock()  # the aligner remembers pairs, and encoding changes its tokenizer's settings

    def completions(self, traces: list[list[int]]) -> list[list[int]]:
        """The student's ids of these completions, given in the teacher's; what they teach is added."""
        completions, learned = self.cut(traces)
        self.add(learned)
        return completions

    def cut(self, traces: list[list[int]]) -> tuple[list[list[int]], Learned]:
        """(the student's ids of these completions, what `add` takes of them)."""
        alignment = self.aligner.align(traces)
        learned = Learned(self.aligner.count(alignment), self.aligner.coverage(alignment))
        return [alignment.trace(i).tolist() for i in range(len(traces))], learned

    def add(self, learned: Learned) -> None:
        self._counts = learned.counts if self._counts is None else self._counts + learned.counts
        self.coverage = learned.coverage if self.coverage is None else self.coverage + learned.coverage

    def finish(self, drawn: "AlignedSignal | None" = None) -> dict[str, int]:
        """Positions by kind; no trace is read after this. drawn: for texts that the teacher did not draw, what its own
        traces taught of how a cut agrees with a piece, which a text of somebody else's cannot say."""
        if self._counts is not None:
            if drawn is not None and drawn._counts is not None:
                self._counts = TextCounts(drawn._counts.keep, drawn._counts.used_S | self._counts.used_S)
            self.aligner.learn(self._counts)
        totals = np.zeros(len(KINDS), np.int64) if self.coverage is None else self.coverage.sum(1)
        return {f"positions_{name}": int(totals[kind]) for kind, name in KINDS.items()}

    def describe(self) -> str:
        """A table: what share of the positions has a distribution, by kind of text."""
        if self.coverage is None:
            return ""
        own, teacher = self.aligner.student.where, self.aligner.teacher.where
        title = f"what is known of {own}'s tokens of the text of {teacher}, before any is left out as too long\n"
        title += "(what is neither aligned nor inner is learned from the text alone):"
        return f"{title}\n{coverage_text(coverage_rows(self.coverage))}"

    def targets(
        self, completions: list[list[int]], teacher_ids: list[list[int]], dists: list[TokenDists], capture: CaptureSpec
    ) -> BucketedTargets:
        """Targets of these traces' student tokens, one behind the other.

        completions: what `completions` returned for teacher_ids. Errors: DataError when the distributions are of
        another text.
        """
        with self._one_at_a_time:
            alignment = self._same(completions, teacher_ids)
            return self._padded(self.aligner.targets(alignment, dists, capture))

    def read_targets(
        self, completions: list[list[int]], teacher_ids: list[list[int]], dists: list[TokenDists]
    ) -> BucketedTargets:
        """`targets` of text that the teacher did not draw, with its chunks (distill.align_read)."""
        with self._one_at_a_time:
            alignment = self._same(completions, teacher_ids)
            found, chunk_N, logp_N = self.aligner.read_targets(alignment, dists)
            read_N = torch.zeros(len(alignment), dtype=torch.bool)
            chunks = {"chunk_N": torch.from_numpy(chunk_N), "chunk_logprobs_N": torch.from_numpy(logp_N)}
            return replace(self._padded(found), drawn_N=read_N, **chunks)

    def _same(self, completions: list[list[int]], teacher_ids: list[list[int]]) -> Alignment:
        alignment = self.aligner.align(teacher_ids)
        if alignment.ids_N.tolist() != [i for ids in completions for i in ids]:
            raise AssertionError("the same text was cut in two ways")
        return alignment

    def _padded(self, targets: BucketTargets) -> BucketedTargets:
        padded = pad(targets, self.aligner.tables)
        return BucketedTargets(*map(torch.from_numpy, (padded.ids_NK, padded.group_NK, padded.logq_NG, padded.tail_N)))
