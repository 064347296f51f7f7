"""Targets on text that the teacher only read: a human's, another model's, what the student wrote itself.

On text that the teacher drew, a target may be taken given what the text says next: that its token goes on, that its cut
agrees with a piece. On average over the draws that adds up to the law of the next token. Here nobody drew by that law,
so a target hangs on what stands BEFORE a position alone. Position kind by position kind (aligned, inner: align_spans):

    aligned       as align_targets has it, whatever the text says next (contradicted at a boundary is one of them).
                  What the text's cut would undo, p(t) (1 - keep), is not left out but shows as the rest.
    inner         the t that begin with the d consumed pieces: those that go on by the root of their piece d; the one
                  that ends there is not left out but shows as the rest: behind it comes another word. Where the cached
                  tail weighs more than a tenth of all of them, too little is known: no distribution.
    otherwise     no distribution. Cross-entropy of the text would teach its writer, not the teacher.

Which member of a bucket comes is what the second term of the loss says of text that was drawn. Here it is the
likelihood of a chunk (distill.losses.chunks): the bytes between two boundaries that both tokenizations have, where one
of its positions has no distribution or a bucket of several. The student's last token of a chunk stands there only if
what follows does not merge with it, its first only because nothing did:

    q = product of the teacher's p(t_i)  *  V(behind) / V(before),  V = sum of p(t) valid(last token, first piece of t)

What is missed: a teacher's token that would have run over the end of the chunk. The last chunk of a text that was cut
short has no end, and no likelihood.

Shape legend: N positions, T teacher tokens, R positions whose past is known, S support entries of these, E outcomes, C
chunks.
"""

from __future__ import annotations

import numpy as np

from distill.align_bytes import run_index
from distill.align_pairs import PairMask
from distill.align_spans import ALIGNED, CONTRADICTED, INNER, INSIDE, Alignment
from distill.align_tables import PairTables
from distill.align_targets import (
    BucketTargets,
    Candidates,
    assemble,
    by_bucket,
    check_same_text,
    concatenate,
    normalise,
    spread_tail,
)
from distill.records import TokenDists

MOST_UNKNOWN = 0.1  # of the mass at an inner position


def read_targets(
    tables: PairTables,
    alignment: Alignment,
    dists: list[TokenDists],
    *,
    keep_P: np.ndarray | None = None,
    pairs: PairMask | None = None,
) -> tuple[BucketTargets, np.ndarray, np.ndarray]:
    """(targets, chunk_N int64, chunk_logprobs_N float32): the chunk of each position, -1 where the targets say all, and
    the teacher's log-probability of that chunk.

    dists: one per text, over the teacher tokens that it holds; keep_P, pairs: as in make_targets.
    Errors: DataError when the distributions are of another text.
    """
    cached = concatenate(dists)
    check_same_text(alignment, cached)
    rows_R = np.flatnonzero(np.isin(alignment.kind_N, (ALIGNED, INNER, CONTRADICTED)))
    said, lost_R, valid_R = _candidates(tables, alignment, cached, rows_R, pairs)
    if keep_P is not None and not tables.identical:
        keep_S = keep_P[said.at_S]
        lost_R = lost_R + np.bincount(said.row_S, np.exp(said.logp_S) * (1 - keep_S), minlength=len(rows_R))
        said = said.weighed(keep_S)
    tail_R, inner_R = cached.tail_T[alignment.teacher_N[rows_R]], alignment.depth_N[rows_R] > 0
    row_E, roots_E, logw_E, rest_R = by_bucket(tables, said, tail_R)
    mass_R = np.bincount(row_E, np.exp(logw_E), minlength=len(rows_R))
    known_R = mass_R + lost_R
    covered_R = (mass_R > 0) & ~(inner_R & (tail_R > MOST_UNKNOWN * known_R))
    logq_E, rest_R = normalise(row_E, logw_E, rest_R + lost_R, said.changed_R)
    kind_R = np.where(inner_R, INNER, ALIGNED).astype(np.uint8)
    targets = assemble(alignment, rows_R, kind_R, covered_R, (row_E, roots_E, logq_E), rest_R)
    valid_N = np.ones(len(alignment))
    valid_N[rows_R] = valid_R
    return targets, *_chunks(tables, alignment, cached, targets, valid_N)


def _candidates(
    tables: PairTables, alignment: Alignment, cached: TokenDists, rows_R: np.ndarray, pairs: PairMask | None
) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """(candidates, mass of those that end where an inner position begins, mass that the pair mask leaves)."""
    token_R, depth_R = alignment.teacher_N[rows_R], alignment.depth_N[rows_R]
    sizes_R, count = np.diff(cached.offsets_T1)[token_R], len(rows_R)
    entries_S = run_index(cached.offsets_T1[token_R], sizes_R)
    ids_S, row_S = cached.ids_S[entries_S], np.repeat(np.arange(count), sizes_R)
    depth_S, logp_S = depth_R[row_S], cached.logprobs_S[entries_S].astype(np.float64)
    at_S = tables.offsets_T1[ids_S] + depth_S
    possible_S = tables.piece_counts_T[ids_S] > depth_S
    reached = np.flatnonzero((depth_S > 0) & (tables.piece_counts_T[ids_S] >= depth_S))
    real_R = tables.offsets_T1[alignment.teacher_ids_T[token_R]] + depth_R - 1
    same = tables.nodes_P[at_S[reached] - 1] == tables.nodes_P[real_R[row_S[reached]]]
    ends = reached[same & ~possible_S[reached]]
    possible_S[reached[~same]] = False
    lost_R = np.bincount(row_S[ends], np.exp(logp_S[ends]), minlength=count)
    valid_R = np.ones(count)
    if pairs is not None and not tables.identical:
        before_S = alignment.before_N[rows_R][row_S]
        asked = np.flatnonzero(possible_S & (depth_S == 0) & (before_S >= 0) & ~tables.marker_T[ids_S])
        possible_S[asked] = pairs.valid(before_S[asked], tables.pieces_P[at_S[asked]])
        merged = asked[~possible_S[asked]]
        valid_R -= np.bincount(row_S[merged], np.exp(logp_S[merged]), minlength=count)
    tail = spread_tail(row_S, logp_S, sizes_R, np.where(depth_R > 0, 0.0, cached.tail_T[token_R]))
    said = Candidates(row_S, at_S, logp_S, *tail, depth_R > 0)
    return said if possible_S.all() else said.only(possible_S), lost_R, valid_R


def _chunks(
    tables: PairTables, alignment: Alignment, cached: TokenDists, targets: BucketTargets, valid_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not len(alignment):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    shared_N = (alignment.kind_N != INSIDE) & (alignment.depth_N == 0)
    chunk_N, starts = np.cumsum(shared_N) - 1, np.flatnonzero(shared_N)
    own_T = np.full(len(cached), -np.inf)
    token_S = np.repeat(np.arange(len(cached)), np.diff(cached.offsets_T1))
    own_S = cached.ids_S == cached.sampled_T[token_S]
    own_T[token_S[own_S]] = cached.logprobs_S[own_S]
    # Probability 0 is as finite as anything below every probability of a student.
    logp_C = np.add.reduceat(np.maximum(own_T, -1e4), alignment.teacher_N[starts])
    smallest = np.finfo(np.float32).tiny
    log_valid_C1 = np.log(np.append(valid_N[starts], 1.0).clip(smallest))
    logp_C = np.minimum(logp_C + log_valid_C1[1:] - log_valid_C1[:-1], 0.0)
    told_N = np.zeros(len(alignment), bool)  # by an outcome of one token: that of the text
    row_E = np.repeat(np.arange(len(targets)), np.diff(targets.offsets_N1))
    own_E = targets.roots_E == tables.root_S[targets.label_N][row_E]
    told_N[row_E[own_E & (tables.bucket_sizes_S[targets.roots_E] == 1)]] = True
    wanted_C = np.add.reduceat(~told_N, starts, dtype=np.int64) > 0
    ends_B = alignment.student_offsets_B1[1:][np.diff(alignment.student_offsets_B1) > 0] - 1
    cut_short_B = ~tables.marker_T[alignment.teacher_ids_T[alignment.teacher_N[ends_B]]]
    wanted_C[chunk_N[ends_B[cut_short_B]]] = False
    return np.where(wanted_C[chunk_N], chunk_N, -1), logp_C[chunk_N].astype(np.float32)
