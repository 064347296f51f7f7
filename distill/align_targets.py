"""The teacher's cached distributions as targets over the student's buckets, position by position.

At student position j, starting in teacher token i whose cached distribution is p over candidates t:

    aligned    Q(c) ~ sum of p(t) keep(t) valid(s_{j-1}, first piece of t) over the t whose first piece has root c
    inner      d pieces behind the beginning of t_i: the t whose pieces begin with the same d and go on, by the root of
               their piece d, times keep, renormalised. Those that end there are dropped: that t_i goes on is given.
    otherwise  no outcomes, the rest has it all: the loss below is then cross-entropy

The cached tail is mass of tokens that are not known. Aligned, it is taken to be like the less likely half of the
support: where those tokens repeat outcomes of likelier ones (the numbers from 100 to 999 begin with nine digits) so
does the tail, and what remains is "the rest", the student tokens in no bucket of the position. Inner, either t_i is one
of the support and stands for all of it, or it was drawn from the tail and stands for that, alone; on average over the
teacher's draws the two make up the whole distribution.

    loss_j = KL(Q || student's mass on the buckets and on the rest) - log P_student(s_j | its bucket)

The second term says which member of the bucket it was; together the two are the cross-entropy of the text, with its
first part averaged over what the teacher might have said. Buckets of one member make it the sparse loss of one
tokenizer and nothing else.

Shape legend: N positions, E outcomes of all positions, S support entries of all positions (teacher candidates), K
members, G outcomes of a position (padded).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from distill.align_bytes import run_index
from distill.align_pairs import PairMask
from distill.align_spans import COVERED, UNCOVERED, Alignment
from distill.align_tables import PairTables
from distill.errors import DataError
from distill.records import CaptureSpec, TokenDists


@dataclass(frozen=True)
class BucketTargets:
    """Targets of N student positions, stored without padding.

    offsets_N1: int64 [N+1]; position n owns the outcomes offsets_N1[n]:offsets_N1[n+1] of roots_E (int32, the student
    id that stands for a bucket, distinct within a position) and logq_E (float32 log-probabilities). tail_N: float32,
    the mass of the rest. kind_N: uint8, a key of align_spans.KINDS. label_N: int64, the student's token.
    """

    offsets_N1: np.ndarray
    roots_E: np.ndarray
    logq_E: np.ndarray
    tail_N: np.ndarray
    kind_N: np.ndarray
    label_N: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def part(self, start: int, stop: int) -> BucketTargets:
        """Positions start .. stop - 1."""
        offsets, rows = self.offsets_N1[start : stop + 1], slice(start, stop)
        entries = slice(int(offsets[0]), int(offsets[-1]))
        of_entry = (self.roots_E[entries], self.logq_E[entries])
        return BucketTargets(offsets - offsets[0], *of_entry, self.tail_N[rows], self.kind_N[rows], self.label_N[rows])


@dataclass(frozen=True)
class PaddedTargets:
    """The same with every bucket written out, as rows of equal width.

    ids_NK: int64 student ids. group_NK: int64, the outcome 0..G-1 that each belongs to, -1 where padded (id 0).
    logq_NG: float32 log-probability of each outcome, -inf where padded. tail_N, kind_N, label_N: as in BucketTargets.
    label_group_N: int64, the outcome that holds the label, -1 for the rest.
    """

    ids_NK: np.ndarray
    group_NK: np.ndarray
    logq_NG: np.ndarray
    tail_N: np.ndarray
    kind_N: np.ndarray
    label_N: np.ndarray
    label_group_N: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """What the teacher might have said at R covered positions, row by row, the most likely first.

    row_S: the position. at_S: the piece (index into pieces_P) by which it would show. logp_S: log-probability. late_S:
    among the less likely half of its teacher token's support. per_late_R: the tail's mass for a unit of the late ones'.
    bare_R: that of a tail without late ones, behind a single candidate. changed_R: whether the position lost or
    reweighed one.
    """

    row_S: np.ndarray
    at_S: np.ndarray
    logp_S: np.ndarray
    late_S: np.ndarray
    per_late_R: np.ndarray
    bare_R: np.ndarray
    changed_R: np.ndarray

    def only(self, keep_S: np.ndarray) -> Candidates:
        """Those of keep_S (bool)."""
        changed_R = self.changed_R.copy()
        changed_R[self.row_S[~keep_S]] = True
        of_entry = (self.row_S, self.at_S, self.logp_S, self.late_S)
        return Candidates(*(values_S[keep_S] for values_S in of_entry), self.per_late_R, self.bare_R, changed_R)

    def weighed(self, keep_S: np.ndarray) -> Candidates:
        """Every candidate's probability times keep."""
        changed_R = self.changed_R.copy()
        changed_R[self.row_S[keep_S != 1]] = True
        return replace(self, logp_S=self.logp_S + np.log(keep_S), changed_R=changed_R)


def make_targets(
    tables: PairTables,
    alignment: Alignment,
    dists: list[TokenDists],
    *,
    capture: CaptureSpec,
    keep_P: np.ndarray | None = None,
    pairs: PairMask | None = None,
) -> BucketTargets:
    """The targets of all positions of an alignment; dists: one per trace, over the teacher tokens that it holds.

    capture: what the distributions were cut to. keep_P: how often the text's cut agrees with each piece (align_keep),
    None for always. pairs: None for no mask.
    Errors: DataError when the distributions are of another text than the traces.
    """
    cached = concatenate(dists)
    check_same_text(alignment, cached)
    rows_R = np.flatnonzero(alignment.kind_N <= COVERED)
    said = _candidates(tables, alignment, cached, rows_R, pairs, capture)
    if keep_P is not None and not tables.identical:
        said = said.weighed(keep_P[said.at_S])
    row_E, roots_E, logw_E, rest_R = by_bucket(tables, said, cached.tail_T[alignment.teacher_N[rows_R]])
    logq_E, tail_R = normalise(row_E, logw_E, rest_R, said.changed_R)
    # A position whose label no candidate says is cross-entropy.
    said_E = roots_E == tables.root_S[alignment.ids_N[rows_R]][row_E]
    covered_R = np.bincount(row_E, said_E, minlength=len(rows_R)) > 0
    return assemble(alignment, rows_R, alignment.kind_N[rows_R], covered_R, (row_E, roots_E, logq_E), tail_R)


def check_same_text(alignment: Alignment, cached: TokenDists) -> None:
    """Returns if the distributions are of the alignment's teacher tokens, else DataError."""
    if not np.array_equal(cached.sampled_T, alignment.teacher_ids_T):
        raise DataError(
            "the teacher's distributions are of another text than the traces",
            where="align",
            value=f"{len(cached)} positions for {len(alignment.teacher_ids_T)} tokens",
            remedy="Sample the traces again: --restart traces.",
        )


def _candidates(
    tables: PairTables,
    alignment: Alignment,
    cached: TokenDists,
    rows_R: np.ndarray,
    pairs: PairMask | None,
    capture: CaptureSpec,
) -> Candidates:
    token_R, depth_R = alignment.teacher_N[rows_R], alignment.depth_N[rows_R]
    sizes_R, inner_R = np.diff(cached.offsets_T1)[token_R], depth_R > 0
    entries_S = run_index(cached.offsets_T1[token_R], sizes_R)
    ids_S, row_S = cached.ids_S[entries_S], np.repeat(np.arange(len(rows_R)), sizes_R)
    depth_S = np.repeat(depth_R, sizes_R)
    at_S = tables.offsets_T1[ids_S] + depth_S
    possible_S = tables.piece_counts_T[ids_S] > depth_S
    inner = np.flatnonzero(possible_S & (depth_S > 0))
    if len(inner):
        real_R = tables.offsets_T1[alignment.teacher_ids_T[token_R]] + depth_R - 1
        same_S = tables.nodes_P[at_S[inner] - 1] == tables.nodes_P[real_R[row_S[inner]]]
        drawn_S = ids_S[inner] == alignment.teacher_ids_T[token_R][row_S[inner]]
        tail_T, tail_S = _from_tail(cached, capture)
        possible_S[inner] = same_S & (drawn_S | ~(tail_T[token_R][row_S[inner]] | tail_S[entries_S[inner]]))
    if pairs is not None and not tables.identical:
        before_S = np.repeat(alignment.before_N[rows_R], sizes_R)
        asked = np.flatnonzero(possible_S & (depth_S == 0) & (before_S >= 0) & ~tables.marker_T[ids_S])
        possible_S[asked] = pairs.valid(before_S[asked], tables.pieces_P[at_S[asked]])
    logp_S = cached.logprobs_S[entries_S].astype(np.float64)
    tail = spread_tail(row_S, logp_S, sizes_R, np.where(inner_R, 0.0, cached.tail_T[token_R]))
    said = Candidates(row_S, at_S, logp_S, *tail, inner_R)
    return said if possible_S.all() else said.only(possible_S)


def spread_tail(
    row_S: np.ndarray, logp_S: np.ndarray, sizes_R: np.ndarray, tail_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """late_S, per_late_R and bare_R of Candidates, of whole supports. tail_R: its mass, 0 where it says nothing."""
    rank_S = np.arange(len(row_S)) - np.repeat(np.cumsum(sizes_R) - sizes_R, sizes_R)
    late_S = 2 * rank_S >= np.repeat(sizes_R, sizes_R)
    late_R = np.bincount(row_S, late_S * np.exp(logp_S), minlength=len(sizes_R))
    return late_S, tail_R / np.where(late_R > 0, late_R, 1.0), np.where(late_R > 0, 0.0, tail_R)


def _from_tail(cached: TokenDists, capture: CaptureSpec) -> tuple[np.ndarray, np.ndarray]:
    """(bool [T]: the token was drawn from the tail and is stored for that alone; bool [S]: a stored token that counts
    as tail, since a drawn one may have taken its place). A full support therefore ends at k_max - 1.

    A cache drops entries lighter than min_mass unless drawn, so a lighter one that stands there was drawn. A heavier
    one from the tail is lighter than its whole support, which is therefore stored whole: the sum below is exact."""
    sizes_T = np.diff(cached.offsets_T1)
    last_T = cached.offsets_T1[1:] - 1
    is_last_T = cached.ids_S[last_T] == cached.sampled_T
    tail_before_T = cached.tail_T + np.exp(cached.logprobs_S[last_T])
    light_T = np.exp(cached.logprobs_S[last_T]) < capture.min_mass
    small_T = is_last_T & (sizes_T > 1) & (cached.tail_T > 0) & (light_T | (tail_before_T <= capture.tail_bound))
    rank_S = np.arange(len(cached.ids_S)) - np.repeat(cached.offsets_T1[:-1], sizes_T)
    beyond_S = (rank_S >= capture.k_max - 1) & np.repeat(cached.tail_T > 0, sizes_T)
    drawn_S = beyond_S & (cached.ids_S == np.repeat(cached.sampled_T, sizes_T))
    return small_T | np.logical_or.reduceat(np.append(drawn_S, False), cached.offsets_T1[:-1]), beyond_S


def by_bucket(
    tables: PairTables, said: Candidates, tail_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, root, log mass) of every outcome: row by row, each row in the order of first mention; mass of the rest.

    The tail goes to outcomes and to the rest as the late candidates do: those that bring a new outcome stand for the
    rest, those that repeat one for their outcome. A bare one is the rest's.
    """
    roots_S = tables.root_S[tables.pieces_P[said.at_S]]
    order = np.argsort(said.row_S * len(tables.root_S) + roots_S, kind="stable")
    row_S, root_S, late_S = said.row_S[order], roots_S[order], said.late_S[order]
    new_S = np.ones(len(order), bool)
    new_S[1:] = (row_S[1:] != row_S[:-1]) | (root_S[1:] != root_S[:-1])
    again_S = late_S & ~new_S
    logp_S = said.logp_S[order] + np.log1p(said.per_late_R[row_S] * again_S)
    late_R = np.bincount(row_S, late_S * new_S * np.exp(logp_S), minlength=len(tail_R))
    rest_R = said.bare_R + said.per_late_R * late_R
    whole_R = ~said.changed_R
    whole_R[row_S[again_S]] = False
    rest_R[whole_R] = tail_R[whole_R]
    starts = np.flatnonzero(new_S)
    if len(starts) < len(order):
        top = np.maximum.reduceat(logp_S, starts)
        shares = np.exp(logp_S - np.repeat(top, np.diff(np.append(starts, len(order)))))
        logp_S = top + np.log(np.add.reduceat(shares, starts))
    mention = np.argsort(order[starts])  # an outcome's first candidate is its most likely one
    at = starts[mention]
    return row_S[at], root_S[at], logp_S[mention], rest_R


def normalise(
    row_E: np.ndarray, logw_E: np.ndarray, rest_R: np.ndarray, changed_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(log q, mass of the rest), both float32. A position that holds all of the teacher's candidates stays as cached,
    to the last bit."""
    total_R = rest_R + np.bincount(row_E, np.exp(logw_E), minlength=len(rest_R))
    total_R = np.where(changed_R & (total_R > 0), total_R, 1.0)
    return (logw_E - np.log(total_R)[row_E]).astype(np.float32), (rest_R / total_R).astype(np.float32)


def assemble(
    alignment: Alignment,
    rows_R: np.ndarray,
    kind_R: np.ndarray,
    covered_R: np.ndarray,
    outcomes: tuple[np.ndarray, np.ndarray, np.ndarray],
    tail_R: np.ndarray,
) -> BucketTargets:
    """All positions, those without outcomes as well; rows_R that are not covered become some of them. outcomes: (row,
    root, log q) [E]."""
    row_E, roots_E, logq_E = outcomes
    kind_N, tail_N = alignment.kind_N.copy(), np.ones(len(alignment), np.float32)
    tail_N[rows_R] = np.where(covered_R, tail_R, 1)
    kind_N[rows_R] = np.where(covered_R, kind_R, UNCOVERED)
    stays_E = covered_R[row_E]
    sizes_N = np.bincount(rows_R[row_E[stays_E]], minlength=len(alignment))
    offsets_N1 = np.concatenate([[0], np.cumsum(sizes_N)])
    return BucketTargets(offsets_N1, roots_E[stays_E], logq_E[stays_E], tail_N, kind_N, alignment.ids_N)


def pad(targets: BucketTargets, tables: PairTables) -> PaddedTargets:
    """Every bucket written out, as rows of the width of the widest."""
    sizes_E = tables.bucket_sizes_S[targets.roots_E]
    counts_N = np.diff(targets.offsets_N1)
    row_E = np.repeat(np.arange(len(targets)), counts_N)
    group_E = np.arange(len(row_E)) - np.repeat(targets.offsets_N1[:-1], counts_N)
    outcomes_NG = np.arange(int(counts_N.max(initial=0))) < counts_N[:, None]
    logq_NG = np.full(outcomes_NG.shape, -np.inf, np.float32)
    logq_NG[outcomes_NG] = targets.logq_E
    width_N = np.bincount(row_E, sizes_E, minlength=len(targets)).astype(np.int64)
    filled_NK = np.arange(int(width_N.max(initial=0))) < width_N[:, None]
    ids_NK, group_NK = np.zeros(filled_NK.shape, np.int64), np.full(filled_NK.shape, -1, np.int64)
    ids_NK[filled_NK] = tables.members_of(targets.roots_E)
    group_NK[filled_NK] = np.repeat(group_E, sizes_E)
    label_group_N = np.full(len(targets), -1, np.int64)
    own_E = targets.roots_E == tables.root_S[targets.label_N][row_E]
    label_group_N[row_E[own_E]] = group_E[own_E]
    return PaddedTargets(ids_NK, group_NK, logq_NG, targets.tail_N, targets.kind_N, targets.label_N, label_group_N)


def concatenate(dists: list[TokenDists]) -> TokenDists:
    """The distributions of several traces, one behind the other."""
    sizes = [np.diff(each.offsets_T1) for each in dists]
    names = ("ids_S", "logprobs_S", "tail_T", "logsumexp_T", "sampled_T")
    joined = {name: np.concatenate([getattr(each, name) for each in dists] or [np.zeros(0)]) for name in names}
    ids = {name: joined[name].astype(np.int32) for name in ("ids_S", "sampled_T")}
    offsets_T1 = np.concatenate([[0], *sizes]).cumsum().astype(np.int64)
    return TokenDists(offsets_T1=offsets_T1, **(joined | ids))
