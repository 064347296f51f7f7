"""Losses of others for a student with another tokenizer, written from the papers' definitions.

    uld      Boizard et al. 2024, "Towards Cross-Tokenizer Distillation": CE + 1.5 sum of |differences| of the two
             distributions sorted, the t-th student token against the t-th teacher token
    gold     Patino et al. 2025, "Unlocking On-Policy Distillation for Any Model Family": tokens are merged into groups
             where both tokenizations have a boundary; a group's distribution is that of its last token times what the
             earlier ones had; strings that both vocabularies hold are compared by generalised Jensen-Shannon (beta
             1/2), all others sorted, as ULD; weights by the share of the vocabulary that is shared; no CE
    gold_ce  the same + CE
    alm      Minixhofer et al. 2025: CE + how likely both find each group, as a yes or no (distill.losses.chunks)
    shared   forward KL over the strings that both hold, both renormalised, where one token stands against one; 0.9 of
             it + 0.1 CE there, CE elsewhere

All are sums over a batch's completions divided by the student's trained tokens, as ours is. Peers get the teacher's
whole distribution, ours what the cache holds.

Shape legend: N student tokens of a batch, T teacher tokens, V and W their vocabularies, R groups, U shared strings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.align import Aligner
from distill.align_spans import Alignment
from distill.losses.chunks import chunk_divergence

ULD_WEIGHT, GOLD_BETA, SHARED_ALPHA = 1.5, 0.5, 0.9


@dataclass(frozen=True)
class Groups:
    """Stretches of text between boundaries that both tokenizations have: index of the first and the last token of each,
    on both sides, int64."""

    student_first_R: np.ndarray
    student_last_R: np.ndarray
    teacher_first_R: np.ndarray
    teacher_last_R: np.ndarray

    def within(self, start: int, stop: int) -> Groups:
        """Those of the student's tokens start .. stop - 1."""
        rows = slice(*np.searchsorted(self.student_first_R, (start, stop)))
        return Groups(*(getattr(self, name)[rows] for name in Groups.__annotations__))

    def shifted(self, students: int, teachers: int) -> Groups:
        """The same where so many more tokens stand before."""
        by = (students, students, teachers, teachers)
        own = (self.student_first_R, self.student_last_R, self.teacher_first_R, self.teacher_last_R)
        return Groups(*(index + more for index, more in zip(own, by)))


def groups_of(aligner: Aligner, alignment: Alignment) -> Groups:
    """The groups of an alignment; completions end in a boundary of both."""
    ends_S = np.cumsum(alignment.lens_N)
    ends_T = np.cumsum(aligner.teacher.lens_V[alignment.teacher_ids_T])
    _, last_S, last_T = np.intersect1d(ends_S, ends_T, return_indices=True)
    first = lambda last: np.concatenate([[0], last[:-1] + 1])  # noqa: E731
    return Groups(first(last_S), last_S, first(last_T), last_T)


def shared_ids(aligner: Aligner) -> tuple[Tensor, Tensor]:
    """(student ids, teacher ids) [U]: text that both hold as one token, and markers that mean the same."""
    teacher, student = aligner.teacher, aligner.student
    pairs = {student.id_of_bytes[raw]: t for raw, t in teacher.id_of_bytes.items() if raw in student.id_of_bytes}
    for t in teacher.markers:
        start, end = aligner.tables.offsets_T1[t : t + 2]
        if end - start == 1 and int(aligner.tables.pieces_P[start]) in student.markers:
            pairs[int(aligner.tables.pieces_P[start])] = t
    return torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))


@dataclass(frozen=True)
class PairBatch:
    """One batch as the losses below see it. logp_NV: the student's log-probabilities; labels_N its tokens; logp_TW,
    labels_T the teacher's; trace_N, trace_T: which completion each belongs to, ascending; place_N, place_T: its number
    in it. first and last tokens of groups: [R]. shared: shared_ids, on the device."""

    logp_NV: Tensor
    labels_N: Tensor
    trace_N: Tensor
    place_N: Tensor
    logp_TW: Tensor
    labels_T: Tensor
    trace_T: Tensor
    place_T: Tensor
    student_first_R: Tensor
    student_last_R: Tensor
    teacher_first_R: Tensor
    teacher_last_R: Tensor
    shared: tuple[Tensor, Tensor]

    @property
    def ce_N(self) -> Tensor:
        return -self.logp_NV.gather(1, self.labels_N[:, None])[:, 0]


def uld(batch: PairBatch) -> Tensor:
    """CE + 1.5 sorted L1, summed."""
    longest = int(torch.maximum(batch.place_N.max(), batch.place_T.max())) + 1
    student = batch.trace_N * longest + batch.place_N
    teacher = batch.trace_T * longest + batch.place_T
    both_N = torch.isin(student, teacher)
    rows_T = torch.isin(teacher, student)
    return batch.ce_N.sum() + ULD_WEIGHT * sorted_l1(batch.logp_NV[both_N].exp(), batch.logp_TW[rows_T].exp()).sum()


def sorted_l1(p_RV: Tensor, q_RW: Tensor) -> Tensor:
    """[R]: the sum of |differences| of both rows sorted; the shorter is padded with 0."""
    width = max(p_RV.shape[1], q_RW.shape[1])
    high = [F.pad(x.sort(1, descending=True).values, (0, width - x.shape[1])) for x in (p_RV, q_RW)]
    return (high[0] - high[1]).abs().sum(1)


def gold(batch: PairBatch) -> Tensor:
    """The hybrid loss of merged groups, summed."""
    student_RV = _merged(batch.logp_NV, batch.labels_N, batch.student_first_R, batch.student_last_R)
    teacher_RW = _merged(batch.logp_TW, batch.labels_T, batch.teacher_first_R, batch.teacher_last_R)
    own_U, theirs_U = batch.shared
    matched_R = generalised_jsd(student_RV[:, own_U], teacher_RW[:, theirs_U], GOLD_BETA)
    rest = [_without(x, ids).exp() for x, ids in ((student_RV, own_U), (teacher_RW, theirs_U))]
    weight = len(own_U) / teacher_RW.shape[1]
    return (weight * matched_R + (1 - weight) * sorted_l1(*rest)).sum()


def gold_ce(batch: PairBatch) -> Tensor:
    return gold(batch) + batch.ce_N.sum()


def alm(batch: PairBatch) -> Tensor:
    """CE + the binary divergence of every group, summed."""
    own = (batch.logp_NV, batch.labels_N, batch.student_first_R, batch.student_last_R)
    theirs = (batch.logp_TW, batch.labels_T, batch.teacher_first_R, batch.teacher_last_R)
    return batch.ce_N.sum() + chunk_divergence(_likelihood(*theirs), _likelihood(*own)).sum()


def shared(batch: PairBatch) -> Tensor:
    """Shared-vocabulary KL where one token stands against one, CE elsewhere, summed."""
    one_R = batch.student_first_R == batch.student_last_R
    one_R &= batch.teacher_first_R == batch.teacher_last_R
    own_U, theirs_U = batch.shared
    rows_N, rows_T = batch.student_last_R[one_R], batch.teacher_last_R[one_R]
    student_RU = batch.logp_NV[rows_N][:, own_U].log_softmax(1)
    teacher_RU = batch.logp_TW[rows_T][:, theirs_U].log_softmax(1)
    kl_R = (teacher_RU.exp() * (teacher_RU - student_RU)).sum(1)
    ce_N = batch.ce_N
    return ce_N.sum() + SHARED_ALPHA * (kl_R - ce_N[rows_N]).sum()


def generalised_jsd(logp_RU: Tensor, logq_RU: Tensor, beta: float) -> Tensor:
    """[R]: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; neither need sum to 1."""
    p_RU, q_RU = logp_RU.exp(), logq_RU.exp()
    logm_RU = (beta * q_RU + (1 - beta) * p_RU).clamp(min=1e-30).log()
    return beta * (q_RU * (logq_RU - logm_RU)).sum(1) + (1 - beta) * (p_RU * (logp_RU - logm_RU)).sum(1)


def _merged(logp_XV: Tensor, labels_X: Tensor, first_R: Tensor, last_R: Tensor) -> Tensor:
    """[R, V] log: the last token's distribution times the probabilities of the group's earlier tokens."""
    return logp_XV[last_R] + _likelihood(logp_XV, labels_X, first_R, last_R - 1)[:, None]


def _likelihood(logp_XV: Tensor, labels_X: Tensor, first_R: Tensor, last_R: Tensor) -> Tensor:
    """[R] log: the probability of the tokens first .. last."""
    own_X = logp_XV.gather(1, labels_X[:, None])[:, 0].double()  # a long sum, of which differences are wanted
    before_X1 = F.pad(own_X.cumsum(0), (1, 0))
    return (before_X1[last_R + 1] - before_X1[first_R]).to(logp_XV.dtype)


def _without(logp_RV: Tensor, ids_U: Tensor) -> Tensor:
    keep_V = torch.ones(logp_RV.shape[1], dtype=torch.bool, device=logp_RV.device)
    keep_V[ids_U] = False
    return logp_RV[:, keep_V]


PEERS = {"uld": uld, "gold": gold, "gold_ce": gold_ce, "alm": alm, "shared": shared}
