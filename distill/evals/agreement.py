"""How closely a student follows its teacher, on completions the teacher wrote for held-out prompts.

All students are measured on the same bytes, through the alignment (distill.align), so the rows of students with
different tokenizers compare: divergence in bits per byte, and by position in bytes. closeness.py measures one
completion; here are the means over many.

Legend: T tokens of one completion, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distill.align import Aligner
from distill.align_report import coverage_rows, covered_share
from distill.errors import DataError
from distill.evals import stats
from distill.evals.closeness import Closeness, closeness
from distill.records import CaptureSpec, TokenDists
from distill.tokens import render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POSITION_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class TeacherTrace:
    """A completion the teacher wrote, in its tokens, with its distributions and what they were cut to."""

    key: str
    prompt: str
    completion_ids: Sequence[int]
    dists: TokenDists
    capture: CaptureSpec


# [(prompt_ids, completion_ids)] -> for each, in order, logits or log-probabilities [T, V] of the completion's tokens.
StudentScore = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], Iterable["torch.Tensor | np.ndarray"]]


def dense_scorer(model: torch.nn.Module, batch_tokens: int = 8192) -> StudentScore:
    """A StudentScore of a transformers causal language model, on the device it is on, in evaluation mode meanwhile.

    Sequences are padded on the right to batches of at most batch_tokens: attention is causal, so padding changes
    nothing before it, and no logits but the completions' are kept.
    """

    @torch.no_grad()
    def score(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[torch.Tensor]:
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for batch in _batches(sequences, batch_tokens):
                rows = [torch.tensor([*prompt_ids, *completion_ids]) for prompt_ids, completion_ids in batch]
                ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                lengths_B1 = torch.tensor([len(row) for row in rows], device=device)[:, None]
                mask_BL = torch.arange(ids_BL.shape[1], device=device) < lengths_B1
                logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
                for (prompt_ids, completion_ids), logits_LV in zip(batch, logits_BLV):
                    first = len(prompt_ids) - 1  # the position that predicts the first completion token
                    yield logits_LV[first : first + len(completion_ids)]
        finally:
            model.train(was_training)

    return score


def _batches(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int) -> Iterator[list]:
    """The sequences in order, cut where another would make the padded batch too large."""
    batch: list = []
    longest = 0
    for sequence in sequences:
        length = sum(map(len, sequence))
        if batch and (len(batch) + 1) * max(longest, length) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(sequence)
        longest = max(longest, length)
    if batch:
        yield batch


def agreement(
    student: str,
    traces: Sequence[TeacherTrace],
    student_score: StudentScore,
    *,
    teacher: PreTrainedTokenizerFast,
    own: PreTrainedTokenizerFast,
    confidence: float = 0.95,
    tables_dir: Path | None = None,
) -> dict:
    """The report's row of one student; intervals are clustered by trace, tokens of one trace being dependent.

    teacher, own: the two tokenizers; student_score is given prompts and completions in its own tokens. bits_per_byte:
    mean KL(teacher || student) over outcomes at temperature 1, of the bytes that have a distribution. kl_per_token: the
    same in nats, per token of this student. top1: share of its tokens at which both find the same outcome most likely.
    by_position: the same by the bytes before. covered_share, coverage: how many positions are measured, and why others
    are not, by kind of text. tables_dir: where alignment tables are kept. Errors: DataError.
    """
    if not traces:
        raise DataError("there is no teacher trace to measure agreement on", where="5-eval")
    aligner = Aligner(teacher, own, tables_dir)
    cut = [aligner.align([list(trace.completion_ids)]) for trace in traces]
    aligner.keep_P = reduce(add, [aligner.count(alignment).keep for alignment in cut]).shares()
    scores = student_score(
        [(render_prompt(own, trace.prompt), alignment.ids_N.tolist()) for trace, alignment in zip(traces, cut)]
    )
    measured, coverage = [], 0
    for trace, alignment, student_NV in zip(traces, cut, scores, strict=True):
        targets = aligner.targets(alignment, [trace.dists], trace.capture)
        coverage = coverage + aligner.coverage(alignment, targets.kind_N)
        measured.append(closeness(student_NV, aligner, alignment, targets, trace.key))
    covered = {"covered_share": covered_share(coverage)["all"], "coverage": coverage_rows(coverage)}
    return {"student": student, **_summary(measured, confidence), **covered}


def _summary(measured: list[Closeness], confidence: float) -> dict:
    by_position = []
    for low, high in zip(POSITION_EDGES, (*POSITION_EDGES[1:], None)):
        row = _ratios([each.between(low, high) for each in measured], confidence)
        if row["tokens"]:
            by_position.append({"from": low, "to": high, **row})
    return {**_ratios(measured, confidence), "by_position": by_position}


def _ratios(measured: list[Closeness], confidence: float) -> dict:
    nats = np.array([each.kl_N.sum() for each in measured])
    same = np.array([each.same_N.sum() for each in measured])
    tokens = np.array([len(each.kl_N) for each in measured])
    n_bytes = np.array([each.bytes_N.sum() for each in measured])
    per_token = stats.ratio_of_sums(nats, tokens, confidence, lowest=0.0)
    bits = stats.ratio_of_sums(nats / math.log(2), n_bytes, confidence, lowest=0.0)
    top1 = stats.ratio_of_sums(same, tokens, confidence, lowest=0.0, highest=1.0)
    values = {"bits_per_byte": _plain(bits), "kl_per_token": _plain(per_token), "top1": _plain(top1)}
    return {**values, "traces": per_token.n_problems, "tokens": per_token.n_samples}


def _plain(estimate: stats.Estimate) -> dict:
    """JSON has no infinity: an end that is not known is None."""
    ends = [None if not np.isfinite(end) else float(end) for end in (estimate.low, estimate.high)]
    return {"value": float(estimate.value), "ci_low": ends[0], "ci_high": ends[1]}
